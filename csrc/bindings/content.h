// content_read. Each op checks the shapes of its tensors, makes its results, and runs on a Device.
#pragma once
#include "tensors.h"

namespace mann_fast {
namespace {

template <class Device>
std::tuple<Tensor, Tensor> content_read(Tensor memory, Tensor key, std::optional<Tensor> sharpness, double eps) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = key.size(1);
  memory = input(memory, {B, N, D});
  key = input(key, {B, R, D});
  sharpness = input(sharpness, {B, R});
  Tensor read = empty(key, {B, R, D}), weights = empty(memory, {B, R, N});
  Device(memory).run(ContentRead{B, N, D, R, dtype_of(memory), dtype_of(key), eps, data(memory), data(key), data(sharpness),
                                 read.mutable_data_ptr(), weights.mutable_data_ptr()});
  return {read, weights};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> content_read_backward(std::optional<Tensor> grad_read, std::optional<Tensor> grad_weights,
                                                         Tensor memory, Tensor key, std::optional<Tensor> sharpness,
                                                         Tensor weights, double eps) {
  const int64_t B = memory.size(0), N = memory.size(1), D = memory.size(2), R = key.size(1);
  grad_read = input(grad_read, {B, R, D});
  grad_weights = input(grad_weights, {B, R, N});
  memory = input(memory, {B, N, D});
  key = input(key, {B, R, D});
  sharpness = input(sharpness, {B, R});
  weights = input(weights, {B, R, N});
  Tensor grad_memory = empty(memory, {B, N, D}), grad_key = empty(key, {B, R, D});
  Tensor grad_sharpness = empty(key, sharpness ? Shape{B, R} : Shape{0});
  Device(memory).run(ContentReadBackward{B, N, D, R, dtype_of(memory), dtype_of(key), eps, data(grad_read), data(grad_weights),
                                         data(memory), data(key), data(sharpness), data(weights),
                                         grad_memory.mutable_data_ptr(), grad_key.mutable_data_ptr(),
                                         sharpness ? grad_sharpness.mutable_data_ptr() : nullptr});
  return {grad_memory, grad_key, grad_sharpness};
}

}  // namespace
}  // namespace mann_fast
