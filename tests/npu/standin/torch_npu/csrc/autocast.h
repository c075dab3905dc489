// torch.autocast("npu"): the lists of operators that PyTorch keeps for its own devices.
#pragma once

#include <ATen/autocast_mode.h>

#include "kernels.h"

namespace {

c10::ArrayRef<c10::IValue> arguments_of(const OperatorHandle& op, Stack* stack) {
  return torch::jit::last(*stack, op.schema().arguments().size());
}

void call_cast(const OperatorHandle& op, Stack* stack, c10::ScalarType dtype) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(DispatchKey::AutocastPrivateUse1);
  const size_t count = op.schema().arguments().size();
  for (const auto i : c10::irange(count))
    for_each_tensor(torch::jit::peek(*stack, i, count),
                    [&](const Tensor& tensor) { return at::autocast::cached_cast(dtype, tensor, NPU); });
  op.callBoxed(stack);
}

void in_lower_precision(const OperatorHandle& op, Stack* stack) {
  call_cast(op, stack, at::autocast::get_autocast_dtype(NPU));
}

void in_float32(const OperatorHandle& op, Stack* stack) { call_cast(op, stack, c10::kFloat); }

void in_widest(const OperatorHandle& op, Stack* stack) {
  auto dtype = at::autocast::get_autocast_dtype(NPU);
  for (c10::IValue value : arguments_of(op, stack))
    for_each_tensor(value, [&](const Tensor& tensor) {
      dtype = at::autocast::prioritize(dtype, tensor, NPU);
      return tensor;
    });
  call_cast(op, stack, dtype);
}

// Softmax and the like read lower precision and are told to answer in float32.
void to_float32(const OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(DispatchKey::AutocastPrivateUse1);
  const auto& arguments = op.schema().arguments();
  if (at::autocast::is_eligible(arguments_of(op, stack)[0].toTensor(), NPU))
    for (const auto i : c10::irange(arguments.size())) {
      c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
      if (arguments[i].name() == "dtype" && value.isNone()) value = c10::kFloat;
    }
  op.callBoxed(stack);
}

#define NAME_OF_OPERATOR(name) #name,
#define NAME_OF_OVERLOAD(name, overload) #name "." #overload,
#define EITHER_NAME(_1, _2, chosen, ...) chosen
#define NAME(...) EITHER_NAME(__VA_ARGS__, NAME_OF_OVERLOAD, NAME_OF_OPERATOR)(__VA_ARGS__)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  for (const char* name : {AT_FORALL_LOWER_PRECISION_FP(NAME)}) m.impl(name, boxed<&in_lower_precision>());
  for (const char* name : {AT_FORALL_FP32(NAME)}) m.impl(name, boxed<&in_float32>());
  for (const char* name : {"norm.Scalar", "norm.ScalarOpt_dim"}) m.impl(name, boxed<&in_float32>());
  for (const char* name : {AT_FORALL_FP32_SET_OPT_DTYPE(NAME)}) m.impl(name, boxed<&to_float32>());
  for (const char* name : {AT_FORALL_PROMOTE(NAME)}) m.impl(name, boxed<&in_widest>());
}

}  // namespace
