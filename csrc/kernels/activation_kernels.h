#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "activation.h"
#include "types.h"

namespace scattermoe::kernels {

// hidden = act(z). All tensors contiguous; z has width columns, or twice as many when the activation is gated.
struct ActivationForwardParams {
    DType dtype = DType::kBFloat16;
    ActivationParams activation;
    const void* z = nullptr;  // [rows, width] or [rows, 2 * width]
    void* hidden = nullptr;   // [rows, width]
    int64_t rows = 0;
    int64_t width = 0;
};

cudaError_t activation_forward(const ActivationForwardParams& params, cudaStream_t stream);

// From dh = dy W_down, the gradient of the expert's output row without its gate g (rows in grouped order):
//   grad_z = g dh act'(z),  gated_hidden = g act(z),  grad_gates[slot] = <dh, act(z)> (+ <dy, b_down>)
// Rows of sentinels are zero. Outputs that are none are not written.
struct ActivationBackwardParams {
    DType dtype = DType::kBFloat16;
    ActivationParams activation;
    const void* grad_hidden = nullptr;        // dh [S, width]
    const void* z = nullptr;                  // [S, width] or [S, 2 * width]
    const void* gates = nullptr;              // [S] by slot, float (double for float64)
    const int32_t* slot_order = nullptr;      // [S]
    const int32_t* expert_offsets = nullptr;  // [E + 1]
    int32_t num_experts = 0;
    void* grad_z = nullptr;        // like z
    void* gated_hidden = nullptr;  // [S, width]
    void* grad_gates = nullptr;    // [S] by slot, float (double for float64)
    int64_t num_slots = 0;
    int64_t width = 0;

    // The bias's part of grad_gates: <grad[slot / top_k], bias[expert]>.
    const void* grad = nullptr;  // [S / top_k, out_features]
    const void* bias = nullptr;  // [E, out_features] or none
    int32_t top_k = 1;
    int64_t out_features = 0;
};

cudaError_t activation_backward(const ActivationBackwardParams& params, cudaStream_t stream);

}  // namespace scattermoe::kernels
