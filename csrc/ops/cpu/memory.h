#pragma once

#include <ATen/ATen.h>

namespace scattermoe::cpu {

// at::empty and at::empty_like, with huge pages asked for where the tensor is large. A fresh tensor's memory comes from
// the system page by page as it is first written; with small pages that costs as much as a fifth of a training step.
at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options);
at::Tensor empty_like(const at::Tensor& tensor);

}  // namespace scattermoe::cpu
