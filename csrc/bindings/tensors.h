// Tensors in and out of the raw ops, for the bindings of every family of ops.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../include/arguments.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace mann_fast {
namespace {

using Shape = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default: STD_TORCH_CHECK(false, "mann_fast ops take float32, float64, bfloat16 and float16 only");
  }
  return Dtype::float32;
}

// A contiguous tensor of the shape that the kernel will index.
Tensor input(const Tensor& tensor, const Shape& shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, "a tensor has another shape than this op's other arguments ask for");
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

MaybeTensor input(const MaybeTensor& tensor, const Shape& shape) {
  return tensor ? MaybeTensor(input(*tensor, shape)) : std::nullopt;
}

const void* data(const Tensor& tensor) { return tensor.const_data_ptr(); }
const void* data(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* pointer(Tensor& tensor, bool there) { return there ? tensor.mutable_data_ptr() : nullptr; }

// On the device of another tensor, contiguous, with nothing in it yet. (torch::stable::new_empty goes by the name of an op and
// boxes its arguments; a step has a dozen results.)
Tensor allocate(const Tensor& like, const Shape& shape, int32_t dtype) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= shape[i] > 1 ? shape[i] : 1) strides[i] = stride;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle allocated;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(), dtype,
                                                  device, like.get_device_index(), &allocated));
  return Tensor(allocated);
}
Tensor empty(const Tensor& like, const Shape& shape) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return allocate(like, shape, dtype);
}
Tensor empty_slots(const Tensor& like, const Shape& shape) { return allocate(like, shape, aoti_torch_dtype_int64()); }

// resets [T, B] (of a step [B]), lengths [B] and start [N, D], as they came; made contiguous.
struct SequenceTensors {
  MaybeTensor resets, lengths, start;
  SequenceTensors(const MaybeTensor& resets, const MaybeTensor& lengths, const MaybeTensor& start, const Shape& steps,
                  int64_t B, const Tensor& memory)
      : resets(input(resets, steps)), lengths(input(lengths, {B})), start(input(start, {memory.size(1), memory.size(2)})) {
    STD_TORCH_CHECK(resets.has_value() == start.has_value(), "resets and start go together");
    STD_TORCH_CHECK(!resets || (resets->scalar_type() == ScalarType::Bool && start->scalar_type() == memory.scalar_type()),
                    "resets must be bool, and start of the dtype of memory");
    STD_TORCH_CHECK(!lengths || lengths->scalar_type() == ScalarType::Long, "lengths must be int64");
  }
  Sequences arguments() const {
    return {resets ? resets->const_data_ptr<bool>() : nullptr, lengths ? lengths->const_data_ptr<int64_t>() : nullptr,
            data(start)};
  }
  // Where each sample's gradient of the start goes; of shape [0] without one.
  Tensor gradient(const Tensor& memory) const {
    return empty(memory, start ? Shape{memory.size(0), memory.size(1), memory.size(2)} : Shape{0});
  }
};

// Anchors of B samples with so many rows of N slots each (../include/arguments.h).
Shape anchors_shape(int64_t T, int64_t anchor_every, int64_t B, int64_t rows, int64_t N) {
  return {anchors_count(T, anchor_every), B, rows, padded_slots(N)};
}

}  // namespace
}  // namespace mann_fast
