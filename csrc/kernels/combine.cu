// Gather-and-sum and its backward: memory-bound, so what counts is 16-byte accesses and enough of them in flight.

#include "combine.h"

#include "combine_device.h"
#include "dependent_launch.h"
#include "dispatch.h"
#include "fast_divider.h"
#include "vector.h"

namespace scattermoe::kernels {

namespace {

template <typename T, bool kAligned, int kRowsInFlight>
__global__ void __launch_bounds__(kRowBlockThreads) combine_kernel(const CombineParams p) {
    begin_dependent();
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= p.num_tokens) return;
    combine_token<T, kAligned, kRowsInFlight, /*kPlain=*/false>(p, token, threadIdx.x, blockDim.x);
}

template <typename T, bool kAligned>
cudaError_t launch_combine(const CombineParams& p, cudaStream_t stream) {
    return with_rows_in_flight(p.top_k, [&](auto rows_in_flight) {
        const dim3 block = row_block(ceil_div(p.hidden, kVectorSize<T, kAligned>));
        const auto grid = static_cast<unsigned>(ceil_div(p.num_tokens, block.y));
        return launch_dependent(combine_kernel<T, kAligned, rows_in_flight.value>, grid, block, 0, stream, p);
    });
}

// One warp for each grouped position.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kRowBlockThreads)
    combine_backward_kernel(const CombineBackwardParams p, const FastDivider top_k) {
    using Compute = ComputeType<T>;
    constexpr int kSize = kVectorSize<T, kAligned>;
    using Vec = Vector<T, kSize>;
    const int lane = threadIdx.x;
    const int64_t position = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (position >= p.num_slots) return;
    const int32_t slot = p.slot_order[position];
    const bool sentinel = p.slot_position[slot] < 0;
    const int64_t row = p.grouped ? position : slot;
    const T* const grad = static_cast<const T*>(p.grad) + int64_t{top_k.divide(slot)} * p.hidden;
    const T* const values = static_cast<const T*>(p.rows) + row * p.hidden;
    T* const grad_row = static_cast<T*>(p.grad_rows) + row * p.hidden;
    const Compute gate = p.gates == nullptr ? Compute(1) : static_cast<const Compute*>(p.gates)[slot];

    Compute dot = 0;
    for (int64_t column = int64_t{lane} * kSize; column < p.hidden; column += kWarpSize * kSize) {
        Vec result = Vec::zero();
        if (!sentinel) {
            const Vec g = Vec::load(grad + column);
            if (p.grad_gates != nullptr) {
                const Vec v = Vec::load(values + column);
#pragma unroll
                for (int c = 0; c < kSize; ++c)
                    dot += g.get(c) * v.get(c);
            }
#pragma unroll
            for (int c = 0; c < kSize; ++c)
                result.set(c, gate * g.get(c));
        }
        if (p.grad_rows != nullptr) result.store(grad_row + column);
    }
    if (p.grad_gates == nullptr) return;
    dot = warp_sum(dot);
    if (lane == 0) static_cast<Compute*>(p.grad_gates)[slot] = dot;
}

}  // namespace

cudaError_t combine(const CombineParams& p, cudaStream_t stream) {
    if (p.num_tokens == 0 || p.hidden == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        return dispatch_bool(has_aligned_rows(p),
                             [&](auto vectors) { return launch_combine<T, vectors.value>(p, stream); });
    });
}

cudaError_t combine_backward(const CombineBackwardParams& p, cudaStream_t stream) {
    if (p.num_slots == 0 || (p.grad_rows == nullptr && p.grad_gates == nullptr)) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool aligned = rows_aligned<T>(p.hidden) && is_vector_aligned(p.grad) && is_vector_aligned(p.rows) &&
                             is_vector_aligned(p.grad_rows);
        return dispatch_bool(aligned, [&](auto vectors) {
            const dim3 block(kWarpSize, kRowBlockThreads / kWarpSize);
            const auto grid = static_cast<unsigned>(ceil_div(p.num_slots, block.y));
            combine_backward_kernel<T, vectors.value><<<grid, block, 0, stream>>>(p, FastDivider(p.top_k));
            return cudaGetLastError();
        });
    });
}

}  // namespace scattermoe::kernels
