#pragma once

// Accumulators to memory by way of a warp's own staging buffers: rounded, turned to rows, and from there by the copy
// engine, or row by row where the output's rows are ragged or scattered.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../ptx/elect.h"
#include "../ptx/fence.h"
#include "../ptx/shared_memory.h"
#include "../ptx/stmatrix.h"
#include "../ptx/tma.h"
#include "../vector.h"
#include "arguments.h"
#include "tile.h"

namespace scattermoe::kernels::sm90 {

// Two neighbouring columns.
template <typename Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t packed;
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    }
    return packed;
}

template <typename Element>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
        return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    }
}

// A warp's sixteen rows of a tile.
struct WarpRows {
    int32_t first;     // grouped position
    int valid;         // how many are the expert's; 16 or more: all
    bool scattered;    // whether they go anywhere else than to their grouped positions
    int32_t lane_row;  // where row lane % 16 goes

    __device__ __forceinline__ WarpRows(const RowMap& map, int32_t first_row, int valid_rows)
        : first(first_row), valid(valid_rows), scattered(map.slot_order != nullptr) {
        lane_row = map(first + min(static_cast<int>(threadIdx.x % 16), valid - 1));
    }
};

// kColumns, 64 or 32, of the 16-bit output at a time: rows of as many bytes as the swizzle is wide.
template <typename Element, int kColumns, int kBuffers>
class StagedStore {
    static_assert(kColumns == 64 || kColumns == 32);
    static constexpr int kPitch = kColumns * 2;
    static constexpr int kRowChunks = kPitch / kVectorBytes;
    static constexpr int kBufferBytes = 16 * kPitch;

  public:
    static constexpr int kBlocks = kColumns / 8;

    __device__ __forceinline__ explicit StagedStore(uint32_t buffers) : buffers_(buffers) {
        const int lane = threadIdx.x % kWarpSize, row = lane % 16;
        lane_offset_ = row * kPitch + swizzle(row, lane / 16);
        asm volatile("" : "+r"(lane_offset_));  // the compiler would else hold all that it is combined with
    }

    // Stages columns given as fragments: fragment(j) -> uint2, columns 8 j + 2 (lane % 4) and the next of row lane / 4
    // and of the row eight below.
    template <typename Fragment>
    __device__ __forceinline__ void stage(Fragment&& fragment) {
        claim();
        const uint32_t address = buffer() + lane_offset_;
#pragma unroll
        for (int j = 0; j < kBlocks; j += 2) {
            const uint2 left = fragment(j), right = fragment(j + 1);
            ptx::stmatrix_x4(address ^ j * kVectorBytes, left.x, left.y, right.x, right.y);
        }
    }

    // What was staged, sixteen bytes of a row.
    __device__ __forceinline__ uint4 load_staged(int row, int chunk) const {
        return ptx::load_shared_128(buffer() + row * kPitch + swizzle(row, chunk));
    }
    __device__ __forceinline__ void next() { index_ = index_ + 1 == kBuffers ? 0 : index_ + 1; }

    // The same with even columns from one fragment and odd ones from another, each of half as many columns.
    template <typename Even, typename Odd>
    __device__ __forceinline__ void stage_interleaved(Even&& even, Odd&& odd) {
        claim();
        const int lane = threadIdx.x % kWarpSize, row = lane / 4, quad = lane % 4;
#pragma unroll
        for (int j = 0; j < kBlocks / 2; ++j) {
            const uint2 e = even(j), o = odd(j);
            const int chunk = 2 * j + quad / 2, offset = quad % 2 * 8;
            ptx::store_shared_64(buffer() + row * kPitch + swizzle(row, chunk) + offset, __byte_perm(e.x, o.x, 0x5410),
                                 __byte_perm(e.x, o.x, 0x7632));
            ptx::store_shared_64(buffer() + (row + 8) * kPitch + swizzle(row + 8, chunk) + offset,
                                 __byte_perm(e.y, o.y, 0x5410), __byte_perm(e.y, o.y, 0x7632));
        }
    }

    // Sends what was staged on its way, by the copy engine.
    __device__ __forceinline__ void send(const CUtensorMap& map, int x, int y, int z) {
        ptx::fence_proxy_async();
        __syncwarp();
        if (ptx::elect()) {
            ptx::tma_store(map, buffer(), x, y, z);
            ptx::tma_store_commit();
        }
        next();
    }

    // ... to an expert's rows: by the copy engine if all sixteen are the expert's and lie in grouped order.
    __device__ __forceinline__ void send(const StoreTarget& target, const WarpRows& rows, int half, int column) {
        if (rows.valid >= 16 && !rows.scattered) {
            send(*target.map, column, half, rows.first);
            return;
        }
        __syncwarp();
        const int lane = threadIdx.x % kWarpSize, chunk = lane % kRowChunks;
        Element* const base = static_cast<Element*>(target.pointer) + half * target.half_stride + column + chunk * 8;
        const bool inside = column + chunk * 8 < target.columns;
#pragma unroll
        for (int pass = 0; pass < 16 * kRowChunks / kWarpSize; ++pass) {
            const int row = pass * (kWarpSize / kRowChunks) + lane / kRowChunks;
            const uint4 values = ptx::load_shared_128(buffer() + row * kPitch + swizzle(row, chunk));
            const int32_t target_row = __shfl_sync(kFullWarp, rows.lane_row, row);
            if (row < rows.valid && inside) *reinterpret_cast<uint4*>(base + target_row * target.stride) = values;
        }
        if (ptx::elect()) ptx::tma_store_commit();  // an empty group, for the count
        next();
    }

    // Shared memory may go once its last readers are done.
    __device__ __forceinline__ static void drain() {
        if (ptx::elect()) ptx::tma_store_wait_all();
    }

  private:
    __device__ __forceinline__ uint32_t buffer() const { return buffers_ + index_ * kBufferBytes; }

    // Waits until the buffer's last contents have left.
    __device__ __forceinline__ void claim() {
        ptx::tma_store_wait_read<kBuffers - 1>();  // but for one lane there is nothing to wait for
        __syncwarp();
    }

    // Byte offset of a 16-byte chunk in its row, as the tensor map's swizzle has it.
    __device__ __forceinline__ static int swizzle(int row, int chunk) {
        return (chunk ^ (kColumns == 64 ? row & 7 : row / 2 & 3)) * kVectorBytes;
    }

    uint32_t buffers_;
    uint32_t lane_offset_;  // in a buffer, of the address that the lane gives for its first two blocks of eight columns
    int index_ = 0;
};

// Zeroes the rows of sentinels, which no tile covers: positions from expert_offsets[num_experts] on, a warp for each.
// `warp` of `warps` in the grid. columns * sizeof(Element) is a multiple of 16.
template <typename Element>
__device__ __forceinline__ void zero_sentinel_rows(Element* out, int64_t stride, int columns, const RowMap& map,
                                                   int32_t first, int32_t num_slots, int warp, int warps) {
    const int lane = threadIdx.x % kWarpSize;
    for (int32_t position = first + warp; position < num_slots; position += warps) {
        Element* const row = out + map(position) * stride;
        for (int column = lane * 8; column < columns; column += kWarpSize * 8) {
            *reinterpret_cast<uint4*>(row + column) = make_uint4(0, 0, 0, 0);
        }
    }
}

}  // namespace scattermoe::kernels::sm90
