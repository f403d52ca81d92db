#pragma once

#include <ATen/ATen.h>

#include "../../kernels/activation.h"

namespace scattermoe::cpu {

// How many rows of `width` elements make a task of a parallel loop over rows.
int64_t rows_per_task(int64_t width);

// hidden = act(z), row by row; both contiguous.
void apply_activation(const ActivationParams& params, const at::Tensor& hidden, const at::Tensor& z);

}  // namespace scattermoe::cpu
