#pragma once

#include <ATen/ATen.h>

namespace scattermoe::cpu {

// x itself where its rows are contiguous in memory, else a copy.
at::Tensor with_contiguous_rows(const at::Tensor& x);

// out[i] = x[slots[i] / top_k]
void gather_rows(const at::Tensor& out, const at::Tensor& x, const int32_t* slots, int64_t top_k);

// out[slots[i]] = rows[i]
void scatter_rows(const at::Tensor& out, const at::Tensor& rows, const int32_t* slots);

// out[slots[i]] = 0 for i in [0, count)
void zero_rows(const at::Tensor& out, const int32_t* slots, int64_t count);

}  // namespace scattermoe::cpu
