#pragma once

// Accumulators to memory: bias, rounding, and a turn through shared memory so that rows leave in 16-byte pieces.

#include <cuda_runtime.h>

#include <cstdint>

#include "../grouped_gemm.h"
#include "mainloop.h"

namespace scattermoe::kernels::sm80 {

// A tile of output: rows [row_begin, row_end) go through a map, columns [column, columns) are in place.
template <typename Element>
struct OutputTile {
    Element* out;
    int64_t stride;
    RowMap row_map;
    int32_t row_begin;
    int32_t row_end;
    int column;
    int columns;
    const Element* bias;  // of column 0, or none
};

template <typename Element, TileId kTileId>
struct StoreEpilogue {
    static constexpr GemmTile kTile = tile_shape(kTileId);
    using Warp = WarpTile<kTileId>;
    static constexpr int kVector = kVectorSize<Element, true>;
    static constexpr int kPad = kVector;  // shifts each row by 16 bytes, so that eight of them lie in different banks
    static constexpr int kPitch = kTile.n + kPad;
    // The tile passes through shared memory at once or, where it does not fit, one row of warps at a time.
    static constexpr bool kWhole = kTile.m * kPitch * static_cast<int>(sizeof(Element)) <= kTile.shared_bytes();
    static constexpr int kPasses = kWhole ? 1 : kTile.warps_m;
    static constexpr int kPassRows = kTile.m / kPasses;
    static_assert(kPassRows * kPitch * static_cast<int>(sizeof(Element)) <= kTile.shared_bytes());

    __device__ __forceinline__ static void run(Accumulators<kTileId>& sums, Element* shared,
                                               const OutputTile<Element>& tile) {
        if (tile.bias != nullptr) add_bias(sums, tile);
        const bool vectors = is_vector_aligned(tile) && tile.stride % kVector == 0;
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
            __syncthreads();
            if (kWhole || Warp::warp_m() == pass * kPassRows) stage(sums, shared, kWhole ? Warp::warp_m() : 0);
            __syncthreads();
            store(shared, tile, pass * kPassRows, vectors);
        }
    }

  private:
    __device__ __forceinline__ static bool is_vector_aligned(const OutputTile<Element>& tile) {
        return reinterpret_cast<uintptr_t>(tile.out) % kVectorBytes == 0;
    }

    __device__ __forceinline__ static int lane_row() { return threadIdx.x % kWarpSize / 4; }
    __device__ __forceinline__ static int lane_column() { return threadIdx.x % kWarpSize % 4 * 2; }

    __device__ __forceinline__ static void add_bias(Accumulators<kTileId>& sums, const OutputTile<Element>& tile) {
#pragma unroll
        for (int n = 0; n < Warp::kBlocksN; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int column = tile.column + Warp::warp_n() + n * 8 + lane_column() + i;
                const float bias = column < tile.columns ? to_compute(tile.bias[column]) : 0.0f;
#pragma unroll
                for (int m = 0; m < Warp::kBlocksM; ++m) {
                    sums[m][n][i] += bias;
                    sums[m][n][i + 2] += bias;
                }
            }
        }
    }

    __device__ __forceinline__ static void stage(const Accumulators<kTileId>& sums, Element* shared, int first_row) {
#pragma unroll
        for (int m = 0; m < Warp::kBlocksM; ++m) {
#pragma unroll
            for (int n = 0; n < Warp::kBlocksN; ++n) {
                Element* const target =
                    shared + (first_row + m * 16 + lane_row()) * kPitch + Warp::warp_n() + n * 8 + lane_column();
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    Vector<Element, 2> pair;
                    pair.set(0, sums[m][n][half * 2]);
                    pair.set(1, sums[m][n][half * 2 + 1]);
                    pair.store(target + half * 8 * kPitch);
                }
            }
        }
    }

    __device__ __forceinline__ static void store(const Element* shared, const OutputTile<Element>& tile, int first_row,
                                                 bool vectors) {
        constexpr int kRowVectors = kTile.n / kVector;
        constexpr int kRowsPerStep = kTile.threads() / kRowVectors;
        static_assert(kTile.threads() % kRowVectors == 0 && kPassRows % kRowsPerStep == 0);
        const int offset = threadIdx.x % kRowVectors * kVector;
        const int column = tile.column + offset;
        if (column >= tile.columns) return;
#pragma unroll 4
        for (int step = 0; step < kPassRows / kRowsPerStep; ++step) {
            const int row = step * kRowsPerStep + threadIdx.x / kRowVectors;
            const int32_t position = tile.row_begin + first_row + row;
            if (position >= tile.row_end) return;
            const auto values = Vector<Element, kVector>::load(shared + row * kPitch + offset);
            Element* const target = tile.out + tile.row_map(position) * tile.stride + column;
            if (vectors && column + kVector <= tile.columns) {
                values.store(target);
            } else {
#pragma unroll
                for (int i = 0; i < kVector; ++i) {
                    if (column + i < tile.columns) target[i] = values.elements[i];
                }
            }
        }
    }
};

}  // namespace scattermoe::kernels::sm80
