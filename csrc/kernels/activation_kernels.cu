// The activation of the expert MLP as passes of their own, for the products whose epilogue does not carry it.

#include "activation_kernels.h"

#include "activation_device.h"
#include "dispatch.h"
#include "expert_offsets.h"
#include "fast_divider.h"
#include "vector.h"

namespace scattermoe::kernels {

namespace {

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowBlockThreads) activation_forward_kernel(const ActivationForwardParams p) {
    constexpr int kSize = kVectorSize<T, kAligned>;
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= p.rows) return;
    const int64_t z_width = is_gated(p.activation.activation) ? 2 * p.width : p.width;
    const T* const z = static_cast<const T*>(p.z) + row * z_width;
    T* const hidden = static_cast<T*>(p.hidden) + row * p.width;
    for (int64_t column = int64_t{threadIdx.x} * kSize; column < p.width; column += int64_t{blockDim.x} * kSize) {
        activate(GluVectors<T, kSize>::load(z, column, p.width, p.activation), p.activation).store(hidden + column);
    }
}

// One warp for each grouped position: the row's dot product needs no other.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowBlockThreads)
    activation_backward_kernel(const ActivationBackwardParams p, const FastDivider top_k) {
    using Compute = ComputeType<T>;
    constexpr int kSize = kVectorSize<T, kAligned>;
    using Vec = Vector<T, kSize>;
    const int lane = threadIdx.x;
    const int64_t position = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (position >= p.num_slots) return;
    const int32_t slot = p.slot_order[position];
    const bool sentinel = position >= p.expert_offsets[p.num_experts];
    const int64_t z_width = is_gated(p.activation.activation) ? 2 * p.width : p.width;
    const T* const z = static_cast<const T*>(p.z) + position * z_width;
    const T* const grad_hidden = static_cast<const T*>(p.grad_hidden) + position * p.width;
    T* const grad_z = static_cast<T*>(p.grad_z) + position * z_width;
    T* const gated_hidden = static_cast<T*>(p.gated_hidden) + position * p.width;
    const Compute gate = sentinel ? Compute(0) : static_cast<const Compute*>(p.gates)[slot];

    Compute dot = 0;
    for (int64_t column = int64_t{lane} * kSize; column < p.width; column += kWarpSize * kSize) {
        ActivationGradient<T, kSize> result;
        if (sentinel) {
            result.grad_z = {Vec::zero(), Vec::zero()};
            result.gated_hidden = Vec::zero();
        } else {
            const auto values = GluVectors<T, kSize>::load(z, column, p.width, p.activation);
            const Vec dh = Vec::load(grad_hidden + column);
            Compute dh_values[kSize];
#pragma unroll
            for (int i = 0; i < kSize; ++i)
                dh_values[i] = dh.get(i);
            result = activate_backward(values, dh_values, gate, p.activation);
            dot += result.dot;
        }
        if (p.grad_z != nullptr) result.grad_z.store(grad_z, column, p.width, p.activation);
        if (p.gated_hidden != nullptr) result.gated_hidden.store(gated_hidden + column);
    }
    if (p.grad_gates == nullptr) return;
    if (p.bias != nullptr && !sentinel) {
        const int64_t expert = expert_of(p.expert_offsets, p.num_experts, position);
        const T* const bias = static_cast<const T*>(p.bias) + expert * p.out_features;
        const T* const grad = static_cast<const T*>(p.grad) + int64_t{top_k.divide(slot)} * p.out_features;
        for (int64_t column = lane; column < p.out_features; column += kWarpSize) {
            dot += to_compute(grad[column]) * to_compute(bias[column]);
        }
    }
    dot = warp_sum(dot);
    if (lane == 0) static_cast<Compute*>(p.grad_gates)[slot] = dot;
}

}  // namespace

cudaError_t activation_forward(const ActivationForwardParams& p, cudaStream_t stream) {
    if (p.rows == 0 || p.width == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool aligned = rows_aligned<T>(p.width) && is_vector_aligned(p.z) && is_vector_aligned(p.hidden);
        return dispatch_bool(aligned, [&](auto vectors) {
            const dim3 block = row_block(ceil_div(p.width, kVectorSize<T, vectors.value>));
            const auto grid = static_cast<unsigned>(ceil_div(p.rows, block.y));
            activation_forward_kernel<T, vectors.value><<<grid, block, 0, stream>>>(p);
            return cudaGetLastError();
        });
    });
}

cudaError_t activation_backward(const ActivationBackwardParams& p, cudaStream_t stream) {
    if (p.num_slots == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool aligned = rows_aligned<T>(p.width) && is_vector_aligned(p.z) && is_vector_aligned(p.grad_hidden) &&
                             is_vector_aligned(p.grad_z) && is_vector_aligned(p.gated_hidden);
        return dispatch_bool(aligned, [&](auto vectors) {
            const dim3 block(kWarpSize, kRowBlockThreads / kWarpSize);
            const auto grid = static_cast<unsigned>(ceil_div(p.num_slots, block.y));
            activation_backward_kernel<T, vectors.value><<<grid, block, 0, stream>>>(p, FastDivider(p.top_k));
            return cudaGetLastError();
        });
    });
}

}  // namespace scattermoe::kernels
