// The device of the stand-in: memory and kernels are the CPU's, but a tensor lives on `npu`, and an operation that
// mixes devices raises as on an accelerator. Importing the module registers everything; a process cannot undo it.

#include <torch/csrc/utils/pybind.h>

#include "autocast.h"
#include "collectives.h"
#include "device.h"
#include "kernels.h"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(NPU, allocator());
  at::setHostAllocator(NPU, pinned_allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  m.def("default_generators", [] {
    std::vector<at::Generator> all;
    for (DeviceIndex i = 0; i < device_count(); ++i) all.push_back(default_generator(i));
    return all;
  });
  m.def("hccl_over", [](const intrusive_ptr<c10d::Backend>& backend) -> intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<HostBackend>(backend);
  });
}
