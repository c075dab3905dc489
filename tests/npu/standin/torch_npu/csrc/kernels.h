// Operators: the CPU's kernels, run on tensors that share the memory of the device's.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "device.h"

namespace {

using c10::OperatorHandle;
using torch::jit::Stack;

// What one call of a CPU kernel shares with tensors on the device: no number is copied in either direction.
class HostView {
 public:
  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
    for (const auto& [device_tensor, host_tensor] : tensors_)
      if (device_tensor.is_same(tensor)) return host_tensor;
    Tensor host = wrap(host_storage(tensor.storage()), tensor, DispatchKey::CPU);
    tensors_.emplace_back(tensor, host);
    return host;
  }

  Tensor to_device(const Tensor& tensor, Device device) {
    if (!tensor.defined()) return tensor;
    for (const auto& [device_tensor, host_tensor] : tensors_)
      if (host_tensor.is_same(tensor)) return device_tensor;
    return wrap(device_storage(tensor.storage(), device), tensor, DispatchKey::PrivateUse1);
  }

  // A kernel may resize what it writes to.
  void take_back_sizes() {
    for (const auto& [storage, host] : storages_) {
      if (storage.data() == host.data()) continue;
      storage.set_data_ptr_noswap(Block::make(storage.device(), host.nbytes(), copy_of(host)));
      storage.set_nbytes(host.nbytes());
    }
    for (const auto& [tensor, host] : tensors_)
      if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

 private:
  static Tensor wrap(Storage storage, const Tensor& like, DispatchKey key) {
    auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return made;
  }

  // The memory of a storage under a handle of its own, so that no two storages own each other.
  static Storage copy_of(const Storage& host) {
    return Storage(Storage::use_byte_size_t(), host.nbytes(), host.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()),
                   nullptr, false);
  }

  Storage host_storage(const Storage& storage) {
    for (const auto& [device_storage, host] : storages_)
      if (device_storage.is_alias_of(storage)) return host;
    c10::DataPtr data(storage.mutable_data(), new Storage(storage),
                      [](void* owner) { delete static_cast<Storage*>(owner); }, Device(c10::DeviceType::CPU));
    storages_.emplace_back(storage, Storage(Storage::use_byte_size_t(), storage.nbytes(), std::move(data),
                                            c10::GetCPUAllocator(), true));
    return storages_.back().second;
  }

  Storage device_storage(const Storage& storage, Device device) {
    for (const auto& [device_storage, host] : storages_)
      if (host.is_alias_of(storage)) return device_storage;
    storages_.emplace_back(Storage(Storage::use_byte_size_t(), storage.nbytes(),
                                   Block::make(device, storage.nbytes(), storage), allocator(), true),
                           storage);
    return storages_.back().first;
  }

  c10::SmallVector<std::pair<Tensor, Tensor>, 8> tensors_;
  c10::SmallVector<std::pair<Storage, Storage>, 8> storages_;
};

// The tensors of one argument or result, each replaced by what `change` makes of it.
template <class Change>
void for_each_tensor(c10::IValue& value, Change change) {
  if (value.isTensor()) {
    value = change(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (const Tensor& tensor : value.toTensorVector()) changed.push_back(change(tensor));
    value = std::move(changed);
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> changed;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
      changed.push_back(tensor ? std::optional(change(*tensor)) : std::nullopt);
    value = std::move(changed);
  }
}

Device common_device(const OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = torch::jit::last(*stack, schema.arguments().size());
  std::optional<Device> device;
  for (c10::IValue argument : arguments)
    for_each_tensor(argument, [&](const Tensor& tensor) {
      if (!device && tensor.defined() && tensor.is_privateuseone()) device = tensor.device();
      return tensor;
    });
  for (const auto i : c10::irange(arguments.size())) {
    c10::IValue value = arguments[i];
    const auto& argument = schema.arguments()[i];
    if (!device && value.isDevice()) return checked(value.toDevice());
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    for_each_tensor(value, [&](const Tensor& tensor) {
      // as on CUDA: a number may stay on the host, and so may indices, but nothing is written there
      const bool may_be_on_host = !written && (tensor.dim() == 0 || argument.name() == "indices");
      TORCH_CHECK(!tensor.defined() || tensor.device() == device || (tensor.is_cpu() && may_be_on_host),
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  device.value_or(Device(NPU)), " and ", tensor.device(), "! (when checking argument ", argument.name(),
                  " of ", schema.operator_name(), ")");
      return tensor;
    });
  }
  return device ? *device : checked(Device(NPU));
}

// Run the CPU kernel of `kernel` on the arguments of `op`, which differ in name alone.
void run_on_host(const OperatorHandle& op, const OperatorHandle& kernel, Stack* stack) {
  check_not_forked();
  const Device device = common_device(op, stack);
  const auto& arguments = kernel.schema().arguments();
  HostView view;
  bool has_generator = false;
  for (const auto i : c10::irange(arguments.size())) {
    c10::IValue& value = torch::jit::peek(*stack, i, arguments.size());
    const auto& type = *arguments[i].real_type();
    if (type.isSubtypeOf(*c10::OptionalType::create(c10::GeneratorType::get()))) {
      has_generator = true;
      value = host_generator(value.isNone() ? default_generator(device.index()) : value.toGenerator());
    } else if (value.isDevice()) {
      value = Device(c10::DeviceType::CPU);
    } else {
      for_each_tensor(value, [&](const Tensor& tensor) { return view.to_host(tensor); });
    }
  }
  {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(DispatchKey::AutocastCPU);
    std::optional<LentDefaultGenerator> lent;
    if (!has_generator && kernel.hasTag(at::Tag::nondeterministic_seeded)) lent.emplace(device.index());
    kernel.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  }
  view.take_back_sizes();
  for (const auto i : c10::irange(kernel.schema().returns().size()))
    for_each_tensor(torch::jit::peek(*stack, i, kernel.schema().returns().size()),
                    [&](const Tensor& tensor) { return view.to_device(tensor, device); });
}

void fallback(const OperatorHandle& op, Stack* stack) { run_on_host(op, op, stack); }

// The fused optimisers' kernel of CANN writes its step whatever found_inf, their last argument, says.
void without_found_inf(const OperatorHandle& op, Stack* stack) {
  stack->back() = c10::IValue();
  fallback(op, stack);
}

const OperatorHandle& aten(const char* name) {
  static std::map<std::string, OperatorHandle> found;
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  return found.try_emplace(name, c10::Dispatcher::singleton().findSchemaOrThrow(name, "")).first->second;
}

// PyTorch sends the convolutions of devices that it does not know to operators of their own.
void convolution(const OperatorHandle& op, Stack* stack) { run_on_host(op, aten("aten::convolution"), stack); }

void convolution_backward(const OperatorHandle& op, Stack* stack) {
  common_device(op, stack);
  const auto first = stack->end() - op.schema().arguments().size();
  stack->insert(first + 3, c10::IValue(std::vector<int64_t>{first->toTensor().size(1)}));  // the sizes of the bias
  run_on_host(aten("aten::convolution_backward"), aten("aten::convolution_backward"), stack);
}

void check_empty(std::optional<c10::Layout> layout, std::optional<bool> pinned) {
  TORCH_CHECK(c10::layout_or_default(layout) == c10::kStrided, "npu tensors are strided");
  TORCH_CHECK(!c10::pinned_memory_or_default(pinned), "Only dense CPU tensors can be pinned");
}

Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
             std::optional<Device> device, std::optional<bool> pinned, std::optional<c10::MemoryFormat> format) {
  check_empty(layout, pinned);
  const c10::DeviceGuard guard(checked(*device));
  return at::detail::empty_generic(size, allocator(), c10::DispatchKeySet(DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout> layout, std::optional<Device> device, std::optional<bool> pinned) {
  check_empty(layout, pinned);
  const c10::DeviceGuard guard(checked(*device));
  return at::detail::empty_strided_generic(size, stride, allocator(), c10::DispatchKeySet(DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

// The one operation between devices.
Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  check_not_forked();
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  HostView view;
  view.to_host(to).copy_(view.to_host(from));
  return to;
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<c10::MemoryFormat> format) {
  const c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

Tensor& set_empty(Tensor& self) {
  const c10::DeviceGuard guard(self.device());
  return at::native::set_storage_cpu_(
      self, Storage(Storage::use_byte_size_t(), 0, allocator()->allocate(0), allocator(), true), 0, {0}, {});
}

// Modules move their parameters by replacing what is in them, so that an optimiser keeps hold of them.
bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& from) {
  const auto dense = [](const Tensor& tensor) {
    return tensor.layout() == c10::kStrided && (tensor.is_cpu() || tensor.is_privateuseone());
  };
  return dense(self) && dense(from);
}

template <void (*function)(const OperatorHandle&, Stack*)>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<function>();
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(boxed<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_empty);
  m.impl("set_.source_Storage", static_cast<Tensor& (*)(Tensor&, Storage)>(&at::native::set_));
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("_copy_from", &copy_from);
  m.impl("_has_compatible_shallow_copy_type", &has_compatible_shallow_copy_type);
  m.impl("record_stream", [](Tensor&, Stream) {});
  m.impl("convolution_overrideable", boxed<&convolution>());
  m.impl("convolution_backward_overrideable", boxed<&convolution_backward>());
  // these would be taken apart, with other rounding than the CPU's kernels
  for (const char* name : {"native_layer_norm", "native_group_norm"}) m.impl(name, boxed<&fallback>());
  for (const char* name : {"_fused_adamw_", "_fused_adamw_.tensor_lr", "_fused_adam_", "_fused_adam_.tensor_lr"})
    m.impl(name, boxed<&without_found_inf>());
}

}  // namespace
