// Sums of rows per expert in a fixed order: an expert's rows are cut into a fixed number of parts, each part is summed
// by one block, and a second kernel adds the parts.

#include "bias_grad.h"

#include "dispatch.h"
#include "select.h"
#include "vector.h"

namespace scattermoe::kernels {

namespace {

constexpr int kColumnThreads = 32;
constexpr int kRowThreads = 8;

// Out is the element type where there is one part, else the compute type of partial sums [parts][E][n].
template <typename T, typename Out, bool kAligned>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads) bias_grad_kernel(const BiasGradParams p, Out* out) {
    using Compute = ComputeType<T>;
    constexpr int kSize = kVectorSize<T, kAligned>;
    __shared__ Compute shared[kRowThreads][kColumnThreads * kSize];
    const int column_blocks = static_cast<int>(ceil_div(p.n, kColumnThreads * kSize));
    const int expert = blockIdx.x / column_blocks, column_block = blockIdx.x % column_blocks;
    const int part = blockIdx.y, parts = gridDim.y;
    const int64_t column = (int64_t{column_block} * kColumnThreads + threadIdx.x) * kSize;
    const int32_t group_begin = p.expert_offsets[expert];
    const int64_t rows = p.expert_offsets[expert + 1] - group_begin;
    const int32_t begin = group_begin + static_cast<int32_t>(rows * part / parts);
    const int32_t end = group_begin + static_cast<int32_t>(rows * (part + 1) / parts);

    Compute sums[kSize] = {};
    if (column < p.n) {
#pragma unroll 4
        for (int32_t position = begin + threadIdx.y; position < end; position += kRowThreads) {
            const T* const row = static_cast<const T*>(p.grad) + p.grad_rows(position) * p.grad_stride;
            const auto values = Vector<T, kSize>::load(row + column);
            const Compute gate =
                p.gates == nullptr ? Compute(1) : static_cast<const Compute*>(p.gates)[p.slot_order[position]];
#pragma unroll
            for (int i = 0; i < kSize; ++i)
                sums[i] += gate * values.get(i);
        }
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i)
        shared[threadIdx.y][threadIdx.x * kSize + i] = sums[i];
    __syncthreads();
    const int thread = threadIdx.y * kColumnThreads + threadIdx.x;
    const int64_t first_column = int64_t{column_block} * kColumnThreads * kSize;
    for (int i = thread; i < kColumnThreads * kSize; i += kColumnThreads * kRowThreads) {
        if (first_column + i >= p.n) break;
        Compute sum = 0;
#pragma unroll
        for (int r = 0; r < kRowThreads; ++r)
            sum += shared[r][i];
        out[(int64_t{part} * p.num_experts + expert) * p.n + first_column + i] = from_compute<Out>(sum);
    }
}

template <typename T>
__global__ void add_parts_kernel(const ComputeType<T>* parts, int num_parts, int64_t size, T* out) {
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i >= size) return;
    ComputeType<T> sum = 0;
    for (int part = 0; part < num_parts; ++part)
        sum += parts[part * size + i];
    out[i] = from_compute<T>(sum);
}

}  // namespace

int64_t bias_grad_workspace(DType dtype, int32_t num_experts, int32_t num_slots, int32_t n) {
    const int64_t parts = bias_grad_parts(num_experts, num_slots, n);
    const int64_t bytes = dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
    return parts == 1 ? 0 : parts * num_experts * n * bytes;
}

cudaError_t bias_grad(const BiasGradParams& p, cudaStream_t stream) {
    if (p.num_experts == 0 || p.n == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const bool aligned = p.n * sizeof(T) % kVectorBytes == 0 && p.grad_stride * sizeof(T) % kVectorBytes == 0 &&
                             is_vector_aligned(p.grad);
        return dispatch_bool(aligned, [&](auto vectors) {
            constexpr bool kAligned = vectors.value;
            const auto parts = static_cast<int>(bias_grad_parts(p.num_experts, p.num_slots, p.n));
            const dim3 block(kColumnThreads, kRowThreads);
            const int64_t blocks = p.num_experts * ceil_div(p.n, kColumnThreads * kVectorSize<T, kAligned>);
            if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
            const dim3 grid(static_cast<unsigned>(blocks), parts);
            if (parts == 1) {
                bias_grad_kernel<T, T, kAligned><<<grid, block, 0, stream>>>(p, static_cast<T*>(p.out));
                return cudaGetLastError();
            }
            auto* const partial = static_cast<ComputeType<T>*>(p.workspace);
            bias_grad_kernel<T, ComputeType<T>, kAligned><<<grid, block, 0, stream>>>(p, partial);
            const int64_t size = int64_t{p.num_experts} * p.n;
            add_parts_kernel<T>
                <<<static_cast<unsigned>(ceil_div(size, kRowBlockThreads)), kRowBlockThreads, 0, stream>>>(
                    partial, parts, size, static_cast<T*>(p.out));
            return cudaGetLastError();
        });
    });
}

}  // namespace scattermoe::kernels
