#pragma once

// out[rows(p)] = in[rows(p)] W[e]^T: scheduler x mainloop x epilogue.

#include <cuda_runtime.h>

#include <cstdint>

#include "../device.h"
#include "../grouped_gemm.h"
#include "../select.h"
#include "../tile_scheduler.h"
#include "mainloop.h"
#include "store_epilogue.h"

// The architecture that device code is being compiled for, as select.h counts them; 0 in the host's pass.
#if defined(__CUDA_ARCH__)
#define SCATTERMOE_CODE_ARCH (__CUDA_ARCH__ / 10)
#else
#define SCATTERMOE_CODE_ARCH 0
#endif

namespace scattermoe::kernels::sm80 {

// Whether select.h may pick the tile for the code being compiled: the other family's kernels stay empty, which halves
// what there is to compile and to ship.
template <TileId kTileId>
inline constexpr bool kTileIsCompiled = (kTileId == TileId::kDeep || kTileId == TileId::kWide ||
                                         kTileId == TileId::kDeepSlim) == has_large_shared_memory(SCATTERMOE_CODE_ARCH);

template <typename Element, TileId kTileId, Major kWeightMajor, bool kAligned>
__global__ void __launch_bounds__(tile_shape(kTileId).threads(), tile_shape(kTileId).blocks_per_sm)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmParams p) {
    if constexpr (kTileIsCompiled<kTileId>) {
        constexpr GemmTile kTile = tile_shape(kTileId);
        extern __shared__ __align__(128) unsigned char shared[];
        const int tiles_n = static_cast<int>(ceil_div(p.n, kTile.n));
        GroupTile tile;
        if (!find_group_tile<kTile.m, kTile.threads()>(p.expert_offsets, p.num_experts, p.num_slots, tiles_n, tile)) {
            return;
        }
        const int column = tile.n * kTile.n;
        const bool sentinels = tile.expert == p.num_experts;

        Accumulators<kTileId> sums = {};
        if (!sentinels && p.k > 0) {
            const MatrixView in(static_cast<const Element*>(p.in), p.in_stride);
            RowsCopy<Element, kTile.m, kTile.k_bytes, kTile.threads(), kAligned> copy_in(
                in, p.k, [&](int row) { return p.in_rows(min(tile.row_begin + row, tile.row_end - 1)); });
            const Element* const weight = static_cast<const Element*>(p.weight) + tile.expert * p.weight_expert_stride;
            const int k_blocks = static_cast<int>(ceil_div(p.k, kTile.k_elements(sizeof(Element))));
            const uint32_t stages = ptx::shared_address(shared);
            if constexpr (kWeightMajor == Major::kK) {
                RowsCopy<Element, kTile.n, kTile.k_bytes, kTile.threads(), kAligned> copy_weight(
                    MatrixView(weight, p.weight_n_stride), p.k, [&](int row) { return min(column + row, p.n - 1); });
                Mainloop<Element, kTileId, Major::kK, Major::kK>::run(sums, stages, copy_in, copy_weight, k_blocks);
            } else {
                DepthCopy<Element, kTile.n, kTile.k_bytes, kTile.threads(), kAligned, AdjacentRows> copy_weight(
                    MatrixView(weight, p.weight_k_stride), column, p.n, p.k, AdjacentRows{});
                Mainloop<Element, kTileId, Major::kK, Major::kMn>::run(sums, stages, copy_in, copy_weight, k_blocks);
            }
        }
        const Element* const bias =
            p.bias == nullptr || sentinels ? nullptr : static_cast<const Element*>(p.bias) + int64_t{tile.expert} * p.n;
        const OutputTile<Element> output{
            static_cast<Element*>(p.out), p.out_stride, p.out_rows, tile.row_begin, tile.row_end, column, p.n, bias};
        StoreEpilogue<Element, kTileId>::run(sums, reinterpret_cast<Element*>(shared), output);
    }
}

template <typename Element, TileId kTileId, Major kWeightMajor, bool kAligned>
cudaError_t launch_grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
    constexpr GemmTile kTile = tile_shape(kTileId);
    const auto kernel = grouped_gemm_kernel<Element, kTileId, kWeightMajor, kAligned>;
    static OncePerDevice shared_memory_allowed;
    DeviceFacts device;
    cudaError_t error = current_device(device);
    if (error != cudaSuccess) return error;
    error = shared_memory_allowed.run(device.device, [&] {
        return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTile.shared_bytes());
    });
    if (error != cudaSuccess) return error;
    const int64_t blocks = max_row_tiles(p.num_slots, p.num_experts, kTile.m) * ceil_div(p.n, kTile.n);
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    kernel<<<static_cast<unsigned>(blocks), kTile.threads(), kTile.shared_bytes(), stream>>>(p);
    return cudaGetLastError();
}

// The kernels of one element type that select.h can ask for.
template <typename Element>
cudaError_t grouped_gemm(const GroupedGemmParams& p, const GemmChoice& choice, cudaStream_t stream) {
    auto launch = [&]<TileId kTileId, bool kAligned>() {
        return p.weight_k_stride == 1 ? launch_grouped_gemm<Element, kTileId, Major::kK, kAligned>(p, stream)
                                      : launch_grouped_gemm<Element, kTileId, Major::kMn, kAligned>(p, stream);
    };
    switch (choice.tile) {
        case TileId::kDeep:
            return choice.vector_copies ? launch.template operator()<TileId::kDeep, true>()
                                        : launch.template operator()<TileId::kDeep, false>();
        case TileId::kFlat:
            return choice.vector_copies ? launch.template operator()<TileId::kFlat, true>()
                                        : launch.template operator()<TileId::kFlat, false>();
        case TileId::kWide:
            return launch.template operator()<TileId::kWide, true>();
        case TileId::kDeepSlim:
            return launch.template operator()<TileId::kDeepSlim, true>();
        case TileId::kFlatSlim:
            return launch.template operator()<TileId::kFlatSlim, true>();
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace scattermoe::kernels::sm80
