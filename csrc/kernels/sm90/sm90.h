#pragma once

// The Hopper kernels as the rest of the library sees them.

#include <cuda_runtime.h>

#include <cstdint>

#include "../activation.h"
#include "../grouped_gemm.h"
#include "select.h"

namespace scattermoe::kernels::sm90 {

// False where the environment sets SCATTERMOE_PORTABLE_KERNELS to anything but 0: what the Hopper kernels are measured
// and checked against.
bool is_enabled();

// What the copy engine asks for: 16-bit elements, and every row of every matrix at a multiple of 16 bytes.
bool can_run(const GroupedGemmParams& params);
cudaError_t grouped_gemm(const GroupedGemmParams& params, cudaStream_t stream);

inline GatheredSide gathered_side(const WeightGradParams& p) {
    return p.left_rows.slot_order != nullptr    ? GatheredSide::kLeft
           : p.right_rows.slot_order != nullptr ? GatheredSide::kRight
                                                : GatheredSide::kNeither;
}

// At most one operand may be gathered; `beside` as kernels::combines_beside() wants it.
bool can_run(const WeightGradParams& params);
cudaError_t weight_grad(const WeightGradParams& params, cudaStream_t stream);

// z = in W^T + b, hidden = act(z) in one pass. z, gemm.out, may be none.
struct GluGemmParams {
    GroupedGemmParams gemm;
    ActivationParams activation;
    void* hidden = nullptr;  // [S, n / 2]
};

bool can_run(const GluGemmParams& params);
cudaError_t glu_gemm(const GluGemmParams& params, cudaStream_t stream);

// dA = in W^T with in the rows of dO by token and W = W_down with n contiguous, taken on through the activation:
//   grad_z = g dA act'(z),  gated_hidden = g act(z),  gate_partials = <dA, act(z)> by parts of the columns
struct GluBackwardGemmParams {
    GroupedGemmParams gemm;  // no out
    ActivationParams activation;
    const void* z = nullptr;       // [S, 2 n]
    const float* gates = nullptr;  // by slot
    const int32_t* slot_order = nullptr;
    void* grad_z = nullptr;          // like z, which it may be, or none
    void* gated_hidden = nullptr;    // [S, n], or none
    float* gate_partials = nullptr;  // [gate_parts(n), S], or none
    float* grad_gates = nullptr;     // by slot, or none: the same where there is one part, zero for sentinels
};

bool can_run(const GluBackwardGemmParams& params);
cudaError_t glu_backward_gemm(const GluBackwardGemmParams& params, cudaStream_t stream);

// The same with a tile of the caller's choice, cudaErrorNotSupported if there is no such kernel: for measurements.
cudaError_t grouped_gemm(const GroupedGemmParams& params, Tile tile, cudaStream_t stream);
cudaError_t weight_grad(const WeightGradParams& params, Tile tile, cudaStream_t stream);
cudaError_t glu_gemm(const GluGemmParams& params, Tile tile, cudaStream_t stream);
cudaError_t glu_backward_gemm(const GluBackwardGemmParams& params, Tile tile, cudaStream_t stream);

}  // namespace scattermoe::kernels::sm90
