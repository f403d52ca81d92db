#include "gate_grad.h"

#include "dependent_launch.h"
#include "dispatch.h"
#include "expert_offsets.h"
#include "fast_divider.h"
#include "vector.h"

namespace scattermoe::kernels {

namespace {

__global__ void __launch_bounds__(kRowBlockThreads) gate_grad_kernel(const GateGradParams p) {
    begin_dependent();
    const int64_t position = int64_t{blockIdx.x} * kRowBlockThreads + threadIdx.x;
    if (position >= p.num_slots) return;
    float sum = 0.0f;
    if (position < p.expert_offsets[p.num_experts]) {
        for (int part = 0; part < p.parts; ++part)
            sum += p.gate_partials[part * p.num_slots + position];
    }
    p.grad_gates[p.slot_order[position]] = sum;
}

// A warp for each position.
template <typename T>
__global__ void __launch_bounds__(kRowBlockThreads)
    gate_grad_bias_kernel(const GateGradParams p, const FastDivider top_k) {
    const int lane = threadIdx.x;
    const int64_t position = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (position >= p.num_slots) return;
    const int32_t slot = p.slot_order[position];
    float sum = 0.0f;
    if (position < p.expert_offsets[p.num_experts]) {
        for (int part = lane; part < p.parts; part += kWarpSize)
            sum += p.gate_partials[part * p.num_slots + position];
        const int64_t expert = expert_of(p.expert_offsets, p.num_experts, position);
        const T* const bias = static_cast<const T*>(p.bias) + expert * p.out_features;
        const T* const grad = static_cast<const T*>(p.grad) + int64_t{top_k.divide(slot)} * p.out_features;
        for (int64_t column = lane; column < p.out_features; column += kWarpSize)
            sum += to_compute(grad[column]) * to_compute(bias[column]);
    }
    sum = warp_sum(sum);
    if (lane == 0) p.grad_gates[slot] = sum;
}

}  // namespace

cudaError_t gate_grad(const GateGradParams& p, cudaStream_t stream) {
    if (p.num_slots == 0) return cudaSuccess;
    if (p.bias == nullptr) {
        return launch_dependent(gate_grad_kernel, static_cast<unsigned>(ceil_div(p.num_slots, kRowBlockThreads)),
                                kRowBlockThreads, 0, stream, p);
    }
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        if constexpr (sizeof(T) == 2) {
            const dim3 block(kWarpSize, kRowBlockThreads / kWarpSize);
            gate_grad_bias_kernel<T>
                <<<static_cast<unsigned>(ceil_div(p.num_slots, block.y)), block, 0, stream>>>(p, FastDivider(p.top_k));
            return cudaGetLastError();
        } else {
            return cudaErrorInvalidValue;
        }
    });
}

}  // namespace scattermoe::kernels
