#pragma once

// out[e] = left_e^T right_e with the contraction over an expert's rows: scheduler x mainloop x epilogue.

#include <cuda_runtime.h>

#include <cstdint>

#include "../device.h"
#include "../grouped_gemm.h"
#include "../select.h"
#include "../tile_scheduler.h"
#include "grouped_gemm_kernel.h"
#include "mainloop.h"
#include "store_epilogue.h"

namespace scattermoe::kernels::sm80 {

template <typename Element, TileId kTileId, bool kAligned>
__global__ void __launch_bounds__(tile_shape(kTileId).threads(), tile_shape(kTileId).blocks_per_sm)
    weight_grad_kernel(const __grid_constant__ WeightGradParams p) {
    if constexpr (kTileIsCompiled<kTileId>) {
        constexpr GemmTile kTile = tile_shape(kTileId);
        extern __shared__ __align__(128) unsigned char shared[];
        const int tiles_m = static_cast<int>(ceil_div(p.m, kTile.m)),
                  tiles_n = static_cast<int>(ceil_div(p.n, kTile.n));
        const int expert = blockIdx.x / (tiles_m * tiles_n);
        const TileIndex tile = banded_order(blockIdx.x % (tiles_m * tiles_n), tiles_m, tiles_n);
        const int32_t begin = p.expert_offsets[expert];
        const int depth = p.expert_offsets[expert + 1] - begin;
        const int row = tile.m * kTile.m, column = tile.n * kTile.n;

        Accumulators<kTileId> sums = {};
        if (depth > 0) {
            DepthCopy<Element, kTile.m, kTile.k_bytes, kTile.threads(), kAligned, PositionRows> copy_left(
                MatrixView(static_cast<const Element*>(p.left), p.left_stride), row, p.m, depth, {p.left_rows, begin});
            DepthCopy<Element, kTile.n, kTile.k_bytes, kTile.threads(), kAligned, PositionRows> copy_right(
                MatrixView(static_cast<const Element*>(p.right), p.right_stride), column, p.n, depth,
                {p.right_rows, begin});
            Mainloop<Element, kTileId, Major::kMn, Major::kMn>::run(
                sums, ptx::shared_address(shared), copy_left, copy_right,
                static_cast<int>(ceil_div(depth, kTile.k_elements(sizeof(Element)))));
        }
        const OutputTile<Element> output{static_cast<Element*>(p.out) + expert * p.out_expert_stride,
                                         p.out_stride,
                                         RowMap{},
                                         row,
                                         min(row + kTile.m, p.m),
                                         column,
                                         p.n,
                                         nullptr};
        StoreEpilogue<Element, kTileId>::run(sums, reinterpret_cast<Element*>(shared), output);
    }
}

template <typename Element, TileId kTileId, bool kAligned>
cudaError_t launch_weight_grad(const WeightGradParams& p, cudaStream_t stream) {
    constexpr GemmTile kTile = tile_shape(kTileId);
    const auto kernel = weight_grad_kernel<Element, kTileId, kAligned>;
    static OncePerDevice shared_memory_allowed;
    DeviceFacts device;
    cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    error = shared_memory_allowed.run(device.device, [&] {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTile.shared_bytes());
    });
    if (error != cudaSuccess) return error;
    const int64_t blocks = p.num_experts * ceil_div(p.m, kTile.m) * ceil_div(p.n, kTile.n);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), kTile.threads(), kTile.shared_bytes(), stream>>>(p);
    return cudaGetLastError();
}

template <typename Element>
cudaError_t weight_grad(const WeightGradParams& p, const GemmChoice& choice, cudaStream_t stream) {
    switch (choice.tile) {
        case TileId::kDeep:
            return choice.vector_copies ? launch_weight_grad<Element, TileId::kDeep, true>(p, stream)
                                        : launch_weight_grad<Element, TileId::kDeep, false>(p, stream);
        case TileId::kFlat:
            return choice.vector_copies ? launch_weight_grad<Element, TileId::kFlat, true>(p, stream)
                                        : launch_weight_grad<Element, TileId::kFlat, false>(p, stream);
        case TileId::kWide:
            return launch_weight_grad<Element, TileId::kWide, true>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace scattermoe::kernels::sm80
