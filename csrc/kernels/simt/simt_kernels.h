#pragma once

// IEEE float32 and float64 products by fused multiply-add: right for any size, stride and alignment, since every
// element travels by itself. Two k-blocks in shared memory, the next one in registers on its way there.

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../grouped_gemm.h"
#include "../select.h"
#include "../tile_scheduler.h"
#include "../vector.h"

namespace scattermoe::kernels::simt {

template <typename T>
struct Config {
    static constexpr GemmTile kTile = tile_shape(std::is_same_v<T, double> ? TileId::kSimt64 : TileId::kSimt32);
    static constexpr int kThreads = kTile.threads();
    static constexpr int kSide = 16;  // threads along m and along n
    static_assert(kSide * kSide == kThreads && kTile.m == kTile.n);
    static constexpr int kMn = kTile.m;
    static constexpr int kK = kTile.k_elements(sizeof(T));
    static constexpr int kOutputs = kMn / kSide;         // of a thread along m and along n
    static constexpr int kRun = 4;                       // adjacent outputs
    static constexpr int kRunStride = kSide * kRun;      // from one run of a thread to its next
    static constexpr int kPitch = kMn + 16 / sizeof(T);  // pads rows apart in the banks, keeps runs aligned
    static constexpr int kLoads = kMn * kK / kThreads;   // elements of an operand that a thread loads
    static_assert(kOutputs % kRun == 0 && kMn * kK % kThreads == 0);
};

// One operand's k-blocks: element (mn, k) is at base + row(...) * stride + column, with rows along mn (kMajor K) or
// along the contraction (kMajor MN). Elements outside are zero.
template <typename T, Major kMajor, typename RowOf>
class Loader {
    using C = Config<T>;

  public:
    // mn_size: valid elements of the tile along mn. row_of maps an index along mn or along k to a row of memory.
    __device__ __forceinline__ Loader(const T* base, int64_t stride, int mn_size, int k_size, RowOf row_of)
        : base_(base), stride_(stride), mn_size_(mn_size), k_size_(k_size), row_of_(row_of) {
        if constexpr (kMajor == Major::kK) {
#pragma unroll
            for (int i = 0; i < C::kLoads; ++i)
                rows_[i] = mn(i) < mn_size_ ? row_of_(mn(i)) : 0;
        }
    }

    __device__ __forceinline__ void load(int k_block) {
#pragma unroll
        for (int i = 0; i < C::kLoads; ++i) {
            const int k = k_block * C::kK + k_of(i);
            const bool inside = mn(i) < mn_size_ && k < k_size_;
            if constexpr (kMajor == Major::kK) {
                values_[i] = inside ? base_[rows_[i] * stride_ + k] : T(0);
            } else {
                values_[i] = inside ? base_[row_of_(k) * stride_ + mn(i)] : T(0);
            }
        }
    }

    // shared[k][mn]
    __device__ __forceinline__ void store(T* shared) const {
#pragma unroll
        for (int i = 0; i < C::kLoads; ++i)
            shared[k_of(i) * C::kPitch + mn(i)] = values_[i];
    }

  private:
    // Neighbouring threads load neighbours in memory.
    __device__ __forceinline__ static int mn(int i) {
        const int index = i * C::kThreads + threadIdx.x;
        return kMajor == Major::kK ? index / C::kK : index % C::kMn;
    }
    __device__ __forceinline__ static int k_of(int i) {
        const int index = i * C::kThreads + threadIdx.x;
        return kMajor == Major::kK ? index % C::kK : index / C::kMn;
    }

    const T* base_;
    int64_t stride_;
    int mn_size_;
    int k_size_;
    RowOf row_of_;
    int32_t rows_[kMajor == Major::kK ? C::kLoads : 1];
    T values_[C::kLoads];
};

template <typename T>
struct SharedTiles {
    using C = Config<T>;
    alignas(16) T a[2][C::kK * C::kPitch];
    alignas(16) T b[2][C::kK * C::kPitch];
};

// Row (or column) of a thread's i-th output along m (or n) in the tile.
template <typename T>
__device__ __forceinline__ int output_index(int thread, int i) {
    using C = Config<T>;
    return i / C::kRun * C::kRunStride + thread * C::kRun + i % C::kRun;
}

template <typename T, typename LoaderA, typename LoaderB>
__device__ __forceinline__ void multiply(T (&sums)[Config<T>::kOutputs][Config<T>::kOutputs], SharedTiles<T>& shared,
                                         LoaderA& a, LoaderB& b, int k_blocks) {
    using C = Config<T>;
    const int thread_m = threadIdx.x / C::kSide, thread_n = threadIdx.x % C::kSide;
    if (k_blocks > 0) {
        a.load(0);
        b.load(0);
    }
    for (int k_block = 0; k_block < k_blocks; ++k_block) {
        T* const tile_a = shared.a[k_block % 2];
        T* const tile_b = shared.b[k_block % 2];
        a.store(tile_a);
        b.store(tile_b);
        // One barrier is enough: the buffer written next was last read before the barrier of this round.
        __syncthreads();
        if (k_block + 1 < k_blocks) {
            a.load(k_block + 1);
            b.load(k_block + 1);
        }
#pragma unroll
        for (int k = 0; k < C::kK; ++k) {
            T va[C::kOutputs], vb[C::kOutputs];
#pragma unroll
            for (int i = 0; i < C::kOutputs; ++i) {
                va[i] = tile_a[k * C::kPitch + output_index<T>(thread_m, i)];
                vb[i] = tile_b[k * C::kPitch + output_index<T>(thread_n, i)];
            }
#pragma unroll
            for (int m = 0; m < C::kOutputs; ++m) {
#pragma unroll
                for (int n = 0; n < C::kOutputs; ++n)
                    sums[m][n] += va[m] * vb[n];
            }
        }
    }
}

template <typename T, Major kWeightMajor>
__global__ void __launch_bounds__(Config<T>::kThreads, Config<T>::kTile.blocks_per_sm)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmParams p) {
    using C = Config<T>;
    __shared__ SharedTiles<T> shared;
    GroupTile tile;
    if (!find_group_tile<C::kMn, C::kThreads>(p.expert_offsets, p.num_experts, p.num_slots,
                                              static_cast<int>(ceil_div(p.n, C::kMn)), tile)) {
        return;
    }
    const int column = tile.n * C::kMn;
    const bool sentinels = tile.expert == p.num_experts;
    T sums[C::kOutputs][C::kOutputs] = {};
    if (!sentinels) {
        const auto in_row = [&](int m) { return p.in_rows(tile.row_begin + m); };
        Loader<T, Major::kK, decltype(in_row)> in(static_cast<const T*>(p.in), p.in_stride,
                                                  tile.row_end - tile.row_begin, p.k, in_row);
        const T* const expert_weight = static_cast<const T*>(p.weight) + tile.expert * p.weight_expert_stride;
        const bool k_major = kWeightMajor == Major::kK;
        const auto weight_row = [&](int i) { return i; };
        Loader<T, kWeightMajor, decltype(weight_row)> weight(expert_weight + column * (k_major ? p.weight_n_stride : 1),
                                                             k_major ? p.weight_n_stride : p.weight_k_stride,
                                                             p.n - column, p.k, weight_row);
        multiply<T>(sums, shared, in, weight, static_cast<int>(ceil_div(p.k, C::kK)));
    }
    const T* const bias =
        p.bias == nullptr || sentinels ? nullptr : static_cast<const T*>(p.bias) + int64_t{tile.expert} * p.n;
#pragma unroll
    for (int m = 0; m < C::kOutputs; ++m) {
        const int32_t position = tile.row_begin + output_index<T>(threadIdx.x / C::kSide, m);
        if (position >= tile.row_end) continue;
        T* const row = static_cast<T*>(p.out) + p.out_rows(position) * p.out_stride;
#pragma unroll
        for (int n = 0; n < C::kOutputs; ++n) {
            const int c = column + output_index<T>(threadIdx.x % C::kSide, n);
            if (c < p.n) row[c] = sums[m][n] + (bias == nullptr ? T(0) : bias[c]);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(Config<T>::kThreads, Config<T>::kTile.blocks_per_sm)
    weight_grad_kernel(const __grid_constant__ WeightGradParams p) {
    using C = Config<T>;
    __shared__ SharedTiles<T> shared;
    const int tiles_m = static_cast<int>(ceil_div(p.m, C::kMn)), tiles_n = static_cast<int>(ceil_div(p.n, C::kMn));
    const int expert = blockIdx.x / (tiles_m * tiles_n);
    const TileIndex tile = banded_order(blockIdx.x % (tiles_m * tiles_n), tiles_m, tiles_n);
    const int32_t begin = p.expert_offsets[expert];
    const int depth = p.expert_offsets[expert + 1] - begin;
    const int first_row = tile.m * C::kMn, column = tile.n * C::kMn;

    const auto left_row = [&](int k) { return p.left_rows(begin + k); };
    const auto right_row = [&](int k) { return p.right_rows(begin + k); };
    Loader<T, Major::kMn, decltype(left_row)> left(static_cast<const T*>(p.left) + first_row, p.left_stride,
                                                   p.m - first_row, depth, left_row);
    Loader<T, Major::kMn, decltype(right_row)> right(static_cast<const T*>(p.right) + column, p.right_stride,
                                                     p.n - column, depth, right_row);
    T sums[C::kOutputs][C::kOutputs] = {};
    multiply<T>(sums, shared, left, right, static_cast<int>(ceil_div(depth, C::kK)));
#pragma unroll
    for (int m = 0; m < C::kOutputs; ++m) {
        const int r = first_row + output_index<T>(threadIdx.x / C::kSide, m);
        if (r >= p.m) continue;
        T* const row = static_cast<T*>(p.out) + expert * p.out_expert_stride + r * p.out_stride;
#pragma unroll
        for (int n = 0; n < C::kOutputs; ++n) {
            const int c = column + output_index<T>(threadIdx.x % C::kSide, n);
            if (c < p.n) row[c] = sums[m][n];
        }
    }
}

template <typename T>
cudaError_t grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
    using C = Config<T>;
    const int64_t blocks = max_row_tiles(p.num_slots, p.num_experts, C::kMn) * ceil_div(p.n, C::kMn);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    const auto kernel = p.weight_k_stride == 1 ? grouped_gemm_kernel<T, Major::kK> : grouped_gemm_kernel<T, Major::kMn>;
    kernel<<<static_cast<unsigned>(blocks), C::kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

template <typename T>
cudaError_t weight_grad(const WeightGradParams& p, cudaStream_t stream) {
    using C = Config<T>;
    const int64_t blocks = p.num_experts * ceil_div(p.m, C::kMn) * ceil_div(p.n, C::kMn);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    weight_grad_kernel<T><<<static_cast<unsigned>(blocks), C::kThreads, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace scattermoe::kernels::simt
