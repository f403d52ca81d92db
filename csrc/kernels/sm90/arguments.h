#pragma once

// What the kernels are launched with. Tensor maps are what the copy engine knows of a matrix: in memory, fastest
// dimension last, in the comments below.

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../activation.h"
#include "../combine.h"
#include "../fast_divider.h"
#include "../grouped_gemm.h"
#include "../vector.h"
#include "select.h"

namespace scattermoe::kernels::sm90 {

// A matrix of which rows are gathered.
struct GatheredMatrix {
    const char* rows;
    uint32_t stride;  // in bytes
    int columns;
    RowMap map;

    // In two steps: what memory says of a position, and where its row is. The first is taken long before the second, so
    // that nobody waits for memory in between.
    __device__ __forceinline__ int32_t look_up(int32_t position) const { return __ldg(map.slot_order + position); }

    // Opaque: the compiler would else multiply again for each copy, and those wide multiplications, beside the tensor
    // cores, cost the kernel a tenth of its speed.
    __device__ __forceinline__ const char* row(int32_t slot) const {
        const char* row = rows + uint64_t{static_cast<uint32_t>(map.top_k.divide(slot))} * stride;
        asm volatile("" : "+l"(row));
        return row;
    }
};

// The pointer of another lane.
__device__ __forceinline__ const char* shuffle(const char* pointer, int lane) {
    return reinterpret_cast<const char*>(__shfl_sync(kFullWarp, reinterpret_cast<uint64_t>(pointer), lane));
}

// A matrix in memory as the copy engine sees it, [rows, halves, columns], and as threads do.
struct StoreTarget {
    const CUtensorMap* map;
    void* pointer;
    int64_t stride;       // of a row, in elements
    int64_t half_stride;  // of a half
    int columns;          // of a half
};

// ---- Epilogues ----

// out = sums + bias.
struct StoreArguments {
    CUtensorMap out_map;  // [S, 1, columns]
    void* out;
    int64_t stride;
    RowMap rows;
    const void* bias;  // [E, columns] or none
    int columns;
};

// z [S, 2 width], its rows in grouped order. To the copy engine it is [S, 2, width], or one half of 2 width columns
// where gates and ups are interleaved.
struct GluMatrix {
    CUtensorMap map;
    void* pointer;

    __device__ __forceinline__ StoreTarget target(GluLayout layout, int width) const {
        return layout == GluLayout::kInterleaved ? StoreTarget{&map, pointer, 2 * int64_t{width}, 0, 2 * width}
                                                 : StoreTarget{&map, pointer, 2 * int64_t{width}, width, width};
    }
};

// z = sums + bias, hidden = act(z) for a gated activation. A tile has the columns of n / 2 gates in its first half and
// those of their ups in the second, whatever the order of the weight's rows.
struct GluArguments {
    GluMatrix z;             // none where z is not wanted
    CUtensorMap hidden_map;  // [S, 1, width]
    void* hidden;
    const void* bias;  // [E, 2 width] or none
    int width;
    GluLayout layout;
    float alpha;
    float limit;
};

// For a row of slot s with gate g:  grad_z = g dA act'(z),  gated_hidden = g act(z),  grad_gates[s] = <dA, act(z)>.
struct GluBackwardArguments {
    CUtensorMap z_map;             // [S, halves, 2 width / halves], as in GluMatrix; a tile's rows at a time
    CUtensorMap grad_z_map;        // the same, sixteen rows at a time
    CUtensorMap gated_hidden_map;  // [S, 1, width]
    void* grad_z;                  // like z, which it may be, or none
    void* gated_hidden;            // [S, width], or none
    const float* gates;            // by slot
    const int32_t* slot_order;     // [S]
    float* gate_partials;          // [tiles_n, S], or none: <dA, act(z)> over a tile's columns, by grouped position
    float* grad_gates;             // [S] by slot, or none: the same where one tile has all columns
    int num_slots;
    int width;
    GluLayout layout;
};

// ---- Products ----

// How a product's rows come to shared memory: by the copy engine, one box a stage, where they lie in grouped order; or
// gathered.
enum class Rows : int { kInOrder, kGathered };

template <typename EpilogueArguments>
struct GroupedGemmArguments {
    CUtensorMap in_map;      // [S, k], rows in order
    CUtensorMap weight_map;  // contraction contiguous: [E, halves, n / halves, k]; else [E, k, n]
    GatheredMatrix in;       // rows gathered
    const int32_t* expert_offsets;
    int num_experts;
    int num_slots;
    int tiles_n;
    FastDivider by_tiles_n;
    int k_blocks;
    int first_half;     // of the weight's rows: that of the tile's first half
    int* tile_counter;  // tile_queue.h
    EpilogueArguments epilogue;
};

struct WeightGradArguments {
    CUtensorMap left_map;   // [S, m]
    CUtensorMap right_map;  // [S, n]
    CUtensorMap out_map;    // [E, m, n]
    GatheredMatrix gathered;
    const int32_t* expert_offsets;
    bool offsets_are_old;   // as in WeightGradParams
    bool operands_are_old;  // likewise
    int num_experts;
    int tiles_m;
    int tiles_n;
    FastDivider by_tiles;    // of an expert, a pair's taken as one
    FastDivider by_tiles_n;  // likewise
    int n;
    int m;
    int* tile_counter;     // tile_queue.h
    CombineParams beside;  // what a helper sums, if the kernel has one
};

}  // namespace scattermoe::kernels::sm90
