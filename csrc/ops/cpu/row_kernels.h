#pragma once

// Vectorised loops over the columns of rows, for T in {double, float, c10::BFloat16, c10::Half}; they compute in double
// for double and in float for the rest.

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "../../kernels/activation.h"

namespace scattermoe::cpu {

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// sum[c] = sum_i scales[i] * rows[i][c]; scales may be null (ones).
template <typename T>
void weighted_sum(Compute<T>* sum, const T* const* rows, const Compute<T>* scales, int64_t num_rows, int64_t width);

// y[c] = x[c], rounded to T.
template <typename T>
void round_row(T* y, const Compute<T>* x, int64_t width);

// y[c] = x[c], for a T of 16 bits.
template <typename T>
void widen_row(float* y, const T* x, int64_t width);

// y[c] = scale * x[c]
template <typename T>
void scale_row(T* y, const T* x, Compute<T> scale, int64_t width);

template <typename T>
Compute<T> dot(const T* a, const T* b, int64_t width);

// h = act(z): z has 2 * hidden columns where the activation is gated and hidden otherwise.
template <typename T>
void activation_forward(const ActivationParams& params, T* h, const T* z, int64_t hidden);

// With dh the gradient of an ungated row: dz = gate * dh * act'(z), gated_h = gate * act(z); returns <dh, act(z)>, the
// gradient of the gate. gated_h may be null.
template <typename T>
Compute<T> activation_backward(const ActivationParams& params, T* dz, T* gated_h, const T* z, const T* dh,
                               Compute<T> gate, int64_t hidden);

}  // namespace scattermoe::cpu
