// Devices, streams and events, memory, random numbers, and the hooks by which PyTorch asks for them.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <mutex>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::intrusive_ptr;
using c10::Storage;
using c10::Stream;

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex MAX_DEVICES = 16;
constexpr size_t DEVICE_MEMORY = size_t{64} << 30;

DeviceIndex device_count() {
  static const DeviceIndex count = [] {
    const char* said = std::getenv("NPU_STANDIN_DEVICES");
    return static_cast<DeviceIndex>(std::clamp(said ? std::atoi(said) : 2, 0, int{MAX_DEVICES}));
  }();
  return count;
}

thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, MAX_DEVICES> current_streams{};
std::atomic<c10::StreamId> last_stream{0};

Device checked(Device device) {
  const DeviceIndex index = device.has_index() ? device.index() : current_device;
  TORCH_CHECK(index >= 0 && index < device_count(), "Invalid NPU device ", int{index}, ", of ", int{device_count()});
  return {NPU, index};
}

// A data worker that is forked from a process with an open device cannot use the device.
void check_not_forked() {
  static const pid_t opened_by = getpid();
  TORCH_CHECK(getpid() == opened_by, "Cannot re-initialize NPU in forked subprocess");
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Clock = std::chrono::steady_clock;

  c10::DeviceType type() const override { return NPU; }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {NPU, current_device}; }
  void setDevice(Device device) const override { current_device = checked(device).index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }

  Stream getStream(Device device) const override {
    const Device real = checked(device);
    return Stream(Stream::UNSAFE, real, current_streams[real.index()]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, checked(device)); }
  Stream getNewStream(Device device, int) const override {
    return Stream(Stream::UNSAFE, checked(device), ++last_stream);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}

  // Work is done when it is submitted: an event is the time at which it was recorded.
  void record(void** event, const Stream&, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) *event = new Clock::time_point;
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Clock::time_point*>(event); }
  double elapsedTime(void* start, void* end, DeviceIndex) const override {
    const auto at = [](void* event) { return *static_cast<Clock::time_point*>(event); };
    return std::chrono::duration<double, std::milli>(at(end) - at(start)).count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Usage {
  std::mutex mutex;
  c10::CachingDeviceAllocator::DeviceStats stats;
};

Usage& usage(DeviceIndex device) {
  static auto* all = new std::array<Usage, MAX_DEVICES>;  // never destroyed: tensors may outlive static objects
  return (*all)[device];
}

// Host memory that counts as memory of a device; `lender` is the CPU storage that it was taken over from, if any.
struct Block {
  DeviceIndex device;
  size_t bytes;
  void* data;
  Storage lender;

  static c10::DataPtr make(Device device, size_t bytes, Storage lender = {}) {
    check_not_forked();
    void* data = lender ? lender.mutable_data() : c10::alloc_cpu(bytes);
    auto* block = new Block{device.index(), bytes, data, std::move(lender)};
    block->count([](auto& stat, size_t amount) { stat.increase(amount); });
    return {data, block, &Block::release, device};
  }

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    block->count([](auto& stat, size_t amount) { stat.decrease(amount); });
    if (!block->lender) c10::free_cpu(block->data);
    delete block;
  }

  template <class Change>
  void count(Change change) {
    Usage& used = usage(device);
    std::lock_guard lock(used.mutex);
    change(used.stats.allocation[0], 1);
    for (auto* stat : {&used.stats.allocated_bytes, &used.stats.reserved_bytes, &used.stats.active_bytes,
                       &used.stats.requested_bytes})
      change((*stat)[0], bytes);
  }
};

struct Allocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override { return Block::make(checked(Device(NPU)), bytes); }
  c10::DeleterFnPtr raw_deleter() const override { return &Block::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, Stream) override {}
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    Usage& used = usage(device);
    std::lock_guard lock(used.mutex);
    return used.stats;
  }
  void resetAccumulatedStats(DeviceIndex device) override {
    reset(device, [](auto& stat) { stat.reset_accumulated(); });
  }
  void resetPeakStats(DeviceIndex device) override {
    reset(device, [](auto& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    return {DEVICE_MEMORY - getDeviceStats(device).allocated_bytes[0].current, DEVICE_MEMORY};
  }

 private:
  template <class Change>
  void reset(DeviceIndex device, Change change) {
    Usage& used = usage(device);
    std::lock_guard lock(used.mutex);
    for (auto* stat : {&used.stats.allocation, &used.stats.allocated_bytes, &used.stats.reserved_bytes,
                       &used.stats.active_bytes, &used.stats.requested_bytes})
      change((*stat)[0]);
  }
};

Allocator* allocator() {
  static auto* instance = new Allocator;
  return instance;
}

// Memory of the host that the device could copy from by itself: ordinary memory that is remembered.
struct PinnedAllocator final : at::HostAllocator {
  static inline std::mutex mutex;
  static inline auto& blocks = *new std::map<const char*, size_t>;  // by the end of the block

  c10::DataPtr allocate(size_t bytes) override {
    auto* data = static_cast<char*>(c10::alloc_cpu(bytes));
    std::lock_guard lock(mutex);
    if (data) blocks[data + bytes] = bytes;
    return {data, data ? data + bytes : nullptr, &PinnedAllocator::release, Device(c10::DeviceType::CPU)};
  }
  static void release(void* end) {
    std::lock_guard lock(mutex);
    const auto found = blocks.find(static_cast<char*>(end));
    if (found == blocks.end()) return;
    c10::free_cpu(static_cast<char*>(end) - found->second);
    blocks.erase(found);
  }
  static bool owns(const void* data) {
    std::lock_guard lock(mutex);
    const auto found = blocks.upper_bound(static_cast<const char*>(data));
    return found != blocks.end() && data >= found->first - found->second;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

PinnedAllocator* pinned_allocator() {
  static auto* instance = new PinnedAllocator;
  return instance;
}

struct NpuGenerator final : c10::GeneratorImpl {
  at::Generator host;  // what the CPU's kernels draw from

  explicit NpuGenerator(DeviceIndex device, at::Generator host = at::detail::createCPUGenerator())
      : GeneratorImpl({NPU, device}, c10::DispatchKeySet(DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  NpuGenerator* clone_impl() const override { return new NpuGenerator(device().index(), host.clone()); }
};

const at::Generator& default_generator(DeviceIndex device) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (DeviceIndex i = 0; i < device_count(); ++i) made->push_back(at::make_generator<NpuGenerator>(i));
    return made;
  }();
  return (*all)[checked(Device(NPU, device)).index()];
}

at::Generator host_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == NPU, "Expected a 'npu' device type for generator but found '",
              generator.device().type(), "'");
  return static_cast<NpuGenerator*>(generator.unsafeGetGeneratorImpl())->host;
}

// Kernels without a generator argument (dropout) draw from the CPU's default one: lend it the device's state.
class LentDefaultGenerator {
 public:
  explicit LentDefaultGenerator(DeviceIndex device)
      : shared_(impl(at::detail::getDefaultCPUGenerator())),
        own_(impl(host_generator(default_generator(device)))),
        kept_(shared_->clone()) {
    copy(*own_, *shared_);
  }
  ~LentDefaultGenerator() {
    copy(*shared_, *own_);
    copy(*kept_, *shared_);
  }

 private:
  static at::CPUGeneratorImpl* impl(const at::Generator& generator) {
    return static_cast<at::CPUGeneratorImpl*>(generator.unsafeGetGeneratorImpl());
  }
  static void copy(at::CPUGeneratorImpl& from, at::CPUGeneratorImpl& to) {
    to.set_engine(from.engine());
    to.set_next_float_normal_sample(from.next_float_normal_sample());
    to.set_next_double_normal_sample(from.next_double_normal_sample());
  }
  at::CPUGeneratorImpl *shared_, *own_;
  std::shared_ptr<at::CPUGeneratorImpl> kept_;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return device_count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice({NPU, device}); }
  DeviceIndex getCurrentDevice() const override { return current_device; }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice({NPU, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? current_device : exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override {
    return at::make_generator<NpuGenerator>(checked(Device(NPU, device)).index());
  }
  Device getDeviceFromPtr(void*) const override { return {NPU, current_device}; }
  bool isPinnedPtr(const void* data) const override { return PinnedAllocator::owns(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const Storage& storage, size_t bytes) const override {
    const c10::DeviceGuard guard(storage.device());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

}  // namespace
