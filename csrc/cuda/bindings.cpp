// The CUDA implementation of the raw ops, a library of its own: torch without CUDA can load the rest. With
// MANN_FAST_EMULATION the same kernels serve CPU tensors, for tests.
#include "../bindings.h"
#include "kernels.h"

#ifndef MANN_FAST_EMULATION
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#define MANN_FAST_KEY CUDA
#else
#define MANN_FAST_KEY CPU
#endif

namespace mann_fast {
namespace {

void launched(const char* op, const char* why) {
  STD_TORCH_CHECK(why == nullptr, "mann_fast: the CUDA kernel of ", op, " cannot be launched: ", why);
}

// The device of a tensor, its current stream, and scratch memory that goes back to torch's allocator after the launch.
class Cuda {
 public:
#ifndef MANN_FAST_EMULATION
  explicit Cuda(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }
#else
  explicit Cuda(const Tensor& like) : like_(like) {}
#endif

  void probe() { launched("a probe", cuda::usable()); }
#define MANN_FAST_RUN(op, Arguments) \
  void run(const Arguments& a) { launched(#op, cuda::op(a, queue())); }
  MANN_FAST_OPS(MANN_FAST_RUN)
#undef MANN_FAST_RUN

 private:
  cuda::Queue queue() {
    return {stream_,
            [](void* self, size_t bytes) -> void* {
              Cuda& cuda = *static_cast<Cuda*>(self);
              cuda.scratch_.push_back(
                  torch::stable::new_empty(cuda.like_, {static_cast<int64_t>(bytes)}, std::make_optional(ScalarType::Byte)));
              return cuda.scratch_.back().mutable_data_ptr();
            },
            this};
  }

  const Tensor& like_;
#ifndef MANN_FAST_EMULATION
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
  std::vector<Tensor> scratch_;
};

// Raises where the kernels cannot run on the tensor's device.
Tensor probe(Tensor tensor) {
  Cuda(tensor).probe();
  return empty(tensor, {0});
}

// Whether cell and its backward have room on the current device, for any batch.
bool cell_fits(int64_t N, int64_t D, int64_t R, int64_t H, int64_t controller, bool separate_vector, bool learned_sharpness,
               bool wide) {
  const auto sized = [&](auto a) {
    a.N = N, a.D = D, a.R = R, a.H = H;
    a.state = wide ? Dtype::float64 : Dtype::float32;
    a.controller = static_cast<Controller>(controller);
    a.separate_vector = separate_vector, a.learned_sharpness = learned_sharpness;
    return a;
  };
  return cuda::cell_unable(sized(Cell{})) == nullptr && cuda::cell_backward_unable(sized(CellBackward{})) == nullptr;
}

// The same of ntm_cell; shifts: 0 of heads that go by content alone.
bool ntm_cell_fits(int64_t N, int64_t D, int64_t R, int64_t H, int64_t controller, int64_t shifts, bool wide) {
  const auto sized = [&](auto a) {
    a.N = N, a.D = D, a.R = R, a.H = H, a.shifts = shifts;
    a.state = wide ? Dtype::float64 : Dtype::float32;
    a.controller = static_cast<Controller>(controller);
    return a;
  };
  return cuda::ntm_cell_unable(sized(NtmCell{})) == nullptr &&
         cuda::ntm_cell_backward_unable(sized(NtmCellBackward{})) == nullptr;
}

// The same of dnc_cell.
bool dnc_cell_fits(int64_t N, int64_t D, int64_t R, int64_t H, int64_t controller, bool link, bool masks, bool link_sharpening,
                   bool wide) {
  const auto sized = [&](auto a) {
    a.N = N, a.D = D, a.R = R, a.H = H, a.masks = masks, a.sharpened = link_sharpening;
    a.state = wide ? Dtype::float64 : Dtype::float32;
    a.controller = static_cast<Controller>(controller);
    if (link) a.before.links = &a;
    return a;
  };
  return cuda::dnc_cell_unable(sized(DncCell{})) == nullptr &&
         cuda::dnc_cell_backward_unable(sized(DncCellBackward{})) == nullptr;
}

// How a scan takes each of B samples in float32, on the current device; backward where anchor_every > 0.
using Layout = std::tuple<int64_t, int64_t, std::string, int64_t>;

template <class Arguments>
Layout layout(const char* (*lay_out)(const Arguments&, cuda::Layout&), const Arguments& a) {
  cuda::Layout layout{};
  const char* why = lay_out(a, layout);
  STD_TORCH_CHECK(why == nullptr, "mann_fast: a CUDA kernel cannot be launched: ", why);
  return {layout.blocks, layout.warps, layout.memory, static_cast<int64_t>(layout.shared)};
}

Layout lrua_scan_layout(int64_t B, int64_t N, int64_t D, int64_t R, int64_t anchor_every) {
  const auto sized = [&](auto a) {
    a.T = a.anchor_every = anchor_every;
    a.B = B, a.N = N, a.D = D, a.R = R;
    return a;
  };
  if (anchor_every > 0) return layout(cuda::lrua_scan_backward_layout, sized(LruaScanBackward{}));
  return layout(cuda::lrua_scan_layout, sized(LruaScan{}));
}

Layout ntm_scan_layout(int64_t B, int64_t N, int64_t D, int64_t R, int64_t W, int64_t shifts, int64_t anchor_every) {
  const auto sized = [&](auto a) {
    a.T = a.anchor_every = anchor_every;
    a.B = B, a.N = N, a.D = D, a.R = R, a.W = W, a.shifts = shifts;
    return a;
  };
  if (anchor_every > 0) return layout(cuda::ntm_scan_backward_layout, sized(NtmScanBackward{}));
  return layout(cuda::ntm_scan_layout, sized(NtmScan{}));
}

Layout dnc_scan_layout(int64_t B, int64_t N, int64_t D, int64_t R, bool link, int64_t anchor_every) {
  const auto sized = [&](auto a) {
    a.T = 1;
    a.B = B, a.N = N, a.D = D, a.R = R;
    a.before.links = link ? &a : nullptr;
    return a;
  };
  if (anchor_every > 0) return layout(cuda::dnc_scan_backward_layout, sized(DncScanBackward{}));
  return layout(cuda::dnc_scan_layout, sized(DncScan{}));
}

}  // namespace
}  // namespace mann_fast

STABLE_TORCH_LIBRARY_IMPL(mann_fast_cuda, CompositeImplicitAutograd, m) {
  m.impl("cell_fits", TORCH_BOX(&mann_fast::cell_fits));
  m.impl("ntm_cell_fits", TORCH_BOX(&mann_fast::ntm_cell_fits));
  m.impl("dnc_cell_fits", TORCH_BOX(&mann_fast::dnc_cell_fits));
  m.impl("lrua_scan_layout", TORCH_BOX(&mann_fast::lrua_scan_layout));
  m.impl("ntm_scan_layout", TORCH_BOX(&mann_fast::ntm_scan_layout));
  m.impl("dnc_scan_layout", TORCH_BOX(&mann_fast::dnc_scan_layout));
  m.impl("sparse_blocks", TORCH_BOX(&mann_fast::cuda::sparse_blocks));
}

STABLE_TORCH_LIBRARY_IMPL(mann_fast_cuda, MANN_FAST_KEY, m) {
  m.impl("probe", TORCH_BOX(&mann_fast::probe));
#define MANN_FAST_REGISTER(op, Arguments) m.impl(#op, TORCH_BOX(&mann_fast::op<mann_fast::Cuda>));
  MANN_FAST_OPS(MANN_FAST_REGISTER)
#undef MANN_FAST_REGISTER
  m.impl("sparse_step_", TORCH_BOX(&mann_fast::sparse_step_<mann_fast::Cuda>));
  m.impl("sparse_step_backward_", TORCH_BOX(&mann_fast::sparse_step_backward_<mann_fast::Cuda>));
}
