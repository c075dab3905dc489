// hccl: another backend, gloo, on tensors that share the memory of the device's.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "kernels.h"

namespace {

Tensor on_host(const Tensor& tensor) {
  TORCH_CHECK(tensor.is_privateuseone(), "hccl takes tensors on npu, this one is on ", tensor.device());
  return HostView().to_host(tensor);
}

template <class Element>
auto on_host(const std::vector<Element>& all) {
  std::vector<Element> hosts;
  for (const auto& element : all) hosts.push_back(on_host(element));
  return hosts;
}

// What gloo does on the host is no business of a TorchDispatchMode that watches the device.
struct Unwatched {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::DispatchKeySet({DispatchKey::Python, DispatchKey::PythonTLSSnapshot})};
};

struct HostWork final : c10d::Work {
  intrusive_ptr<Work> inner;
  std::vector<Tensor> outputs;
  bool awaited = false;

  HostWork(intrusive_ptr<Work> inner, std::vector<Tensor> outputs)
      : inner(std::move(inner)), outputs(std::move(outputs)) {}
  bool isCompleted() override { return inner->isCompleted(); }
  bool isSuccess() const override { return inner->isSuccess(); }
  std::exception_ptr exception() const override { return inner->exception(); }
  int sourceRank() const override { return inner->sourceRank(); }
  std::vector<Tensor> result() override { return outputs; }
  void synchronize() override { wait(kNoTimeout); }
  bool wait(std::chrono::milliseconds timeout) override {
    const Unwatched unwatched;
    // gloo's reduce_scatter writes its result at each wait, also over a mean
    if (!awaited) awaited = inner->wait(timeout);
    return awaited;
  }
  void abort() override { inner->abort(); }
  intrusive_ptr<c10::ivalue::Future> getFuture() override {
    std::vector<Device> devices;
    for (const auto& output : outputs)
      if (std::find(devices.begin(), devices.end(), output.device()) == devices.end())
        devices.push_back(output.device());
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::ofTensors(), std::move(devices));
    inner->getFuture()->addCallback([future, outputs = outputs](c10::ivalue::Future& done) {
      done.hasError() ? future->setError(done.exception_ptr()) : future->markCompleted(c10::IValue(outputs));
    });
    return future;
  }
};

struct HostBackend final : c10d::Backend {
  using Tensors = std::vector<Tensor>;
  using Lists = std::vector<Tensors>;
  using Started = intrusive_ptr<c10d::Work>;
  intrusive_ptr<c10d::Backend> inner;

  explicit HostBackend(intrusive_ptr<c10d::Backend> backend)
      : Backend(backend->getRank(), backend->getSize()), inner(std::move(backend)) {}
  const std::string getBackendName() const override { return "hccl"; }
  void setSequenceNumberForGroup() override { inner->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner->getSequenceNumberForGroup(); }
  void setTimeout(std::chrono::milliseconds timeout) override { inner->setTimeout(timeout); }
  void abort() override { inner->abort(); }
  void shutdown() override { inner->shutdown(); }

  Started broadcast(Tensors& x, const c10d::BroadcastOptions& o) override {
    auto host = on_host(x);
    return start(x, [&] { return inner->broadcast(host, o); });
  }
  Started allreduce(Tensors& x, const c10d::AllreduceOptions& o) override {
    auto host = on_host(x);
    return reduced(o, x, [&](const auto& sum) { return inner->allreduce(host, sum); });
  }
  Started allreduce_coalesced(Tensors& x, const c10d::AllreduceCoalescedOptions& o) override {
    auto host = on_host(x);
    return reduced(o, x, [&](const auto& sum) { return inner->allreduce_coalesced(host, sum); });
  }
  Started reduce(Tensors& x, const c10d::ReduceOptions& o) override {
    auto host = on_host(x);
    return reduced(o, x, [&](const auto& sum) { return inner->reduce(host, sum); });
  }
  Started allgather(Lists& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    auto host_out = on_host(out);
    auto host_in = on_host(in);
    return start(flat(out), [&] { return inner->allgather(host_out, host_in, o); });
  }
  Started _allgather_base(Tensor& out, Tensor& in, const c10d::AllgatherOptions& o) override {
    auto host_out = on_host(out), host_in = on_host(in);
    return start({out}, [&] { return inner->_allgather_base(host_out, host_in, o); });
  }
  Started allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& o) override {
    auto host_out = on_host(out), host_in = on_host(in);
    return start(out, [&] { return inner->allgather_into_tensor_coalesced(host_out, host_in, o); });
  }
  Started gather(Lists& out, Tensors& in, const c10d::GatherOptions& o) override {
    auto host_out = on_host(out);
    auto host_in = on_host(in);
    return start(flat(out), [&] { return inner->gather(host_out, host_in, o); });
  }
  Started scatter(Tensors& out, Lists& in, const c10d::ScatterOptions& o) override {
    auto host_out = on_host(out);
    auto host_in = on_host(in);
    return start(out, [&] { return inner->scatter(host_out, host_in, o); });
  }
  Started reduce_scatter(Tensors& out, Lists& in, const c10d::ReduceScatterOptions& o) override {
    auto host_out = on_host(out);
    auto host_in = on_host(in);
    return reduced(o, out, [&](const auto& sum) { return inner->reduce_scatter(host_out, host_in, sum); });
  }
  Started _reduce_scatter_base(Tensor& out, Tensor& in, const c10d::ReduceScatterOptions& o) override {
    auto host_out = on_host(out), host_in = on_host(in);
    return reduced(o, {out}, [&](const auto& sum) { return inner->_reduce_scatter_base(host_out, host_in, sum); });
  }
  Started reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& o) override {
    auto host_out = on_host(out), host_in = on_host(in);
    return reduced(o, out,
                   [&](const auto& sum) { return inner->reduce_scatter_tensor_coalesced(host_out, host_in, sum); });
  }
  Started alltoall_base(Tensor& out, Tensor& in, std::vector<int64_t>& out_sizes, std::vector<int64_t>& in_sizes,
                        const c10d::AllToAllOptions& o) override {
    auto host_out = on_host(out), host_in = on_host(in);
    return start({out}, [&] { return inner->alltoall_base(host_out, host_in, out_sizes, in_sizes, o); });
  }
  Started send(Tensors& x, int rank, int tag) override {
    auto host = on_host(x);
    return start(x, [&] { return inner->send(host, rank, tag); });
  }
  Started recv(Tensors& x, int rank, int tag) override {
    auto host = on_host(x);
    return start(x, [&] { return inner->recv(host, rank, tag); });
  }
  Started barrier(const c10d::BarrierOptions& o) override { return start({}, [&] { return inner->barrier(o); }); }

 private:
  template <class Begin>
  static Started start(Tensors outputs, Begin begin) {
    const Unwatched unwatched;
    return c10::make_intrusive<HostWork>(begin(), std::move(outputs));
  }
  // gloo has no mean: its sum is awaited and divided
  template <class Options, class Begin>
  Started reduced(Options options, Tensors outputs, Begin begin) {
    const bool mean = options.reduceOp == c10d::ReduceOp::AVG;
    if (mean) options.reduceOp = c10d::ReduceOp::SUM;
    auto work = start(outputs, [&] { return begin(options); });
    if (mean) {
      const Unwatched unwatched;
      work->wait();
      for (Tensor& output : outputs) on_host(output).div_(size_);
    }
    return work;
  }
  static Tensors flat(const Lists& lists) {
    Tensors all;
    for (const auto& list : lists) all.insert(all.end(), list.begin(), list.end());
    return all;
  }
};

}  // namespace
