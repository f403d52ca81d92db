#include "gemm_avx512.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>

#if !defined(__clang__)
// GCC 12 warns of its own intrinsics, which leave the lanes they do not need undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace scattermoe::cpu {

namespace {

// Per function, because the library is compiled for the oldest x86-64.
#define SCATTERMOE_AVX512 __attribute__((target("avx512f,avx512vl")))
// Arrays of vectors stay in registers only where the loops over them are gone early on.
#define SCATTERMOE_UNROLL _Pragma("GCC unroll 8")

constexpr int64_t kLanes = 16;
// A tile is 24 vectors of sums, which with four of b and one of a fill the 32 registers.
constexpr int64_t kTileRows = 6;
constexpr int64_t kTileVectors = 4;
// k is cut into pieces of this depth: the columns of b under an outer tile, 128 KiB, stay in the L2 cache while the
// rows of a pass by. Adding up pieces is also more exact than one long sum.
constexpr int64_t kDepth = 512;
// Rows of a that stay in the L2 cache, 240 KiB, while the columns of b pass by an inner tile.
constexpr int64_t kCachedRows = 20 * kTileRows;

struct Tile {
    float* out;
    int64_t out_stride;
    const float* a;
    int64_t a_row_stride;
    int64_t a_column_stride;
    const float* b;
    int64_t b_stride;  // between the rows of an outer tile's b, between the columns of an inner tile's
    int64_t k;
    int64_t columns;  // of b, from the tile's first on
    bool accumulate;
    const float* next;  // to prefetch while b is read, at the same strides
};

SCATTERMOE_AVX512 inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << std::max<int64_t>(count, 0)) - 1);
}

template <bool kMasked>
SCATTERMOE_AVX512 inline __m512 load(const float* x, __mmask16 mask) {
    return kMasked ? _mm512_maskz_loadu_ps(mask, x) : _mm512_loadu_ps(x);
}

template <int64_t kRows>
using Sums = __m512[kRows][kTileVectors];

template <int64_t kRows, bool kMasked>
SCATTERMOE_AVX512 inline void add_outer_products(Sums<kRows>& sum, const Tile& tile, const __mmask16* mask) {
    const float *a = tile.a, *b = tile.b, *next = tile.next;
    for (int64_t p = 0; p < tile.k; ++p, a += tile.a_column_stride, b += tile.b_stride, next += tile.b_stride) {
        __m512 row[kTileVectors];
        SCATTERMOE_UNROLL for (int64_t v = 0; v < kTileVectors; ++v) {
            row[v] = load<kMasked>(b + v * kLanes, mask[v]);
        }
        _mm_prefetch(next, _MM_HINT_T1);
        SCATTERMOE_UNROLL for (int64_t i = 0; i < kRows; ++i) {
            const __m512 factor = _mm512_set1_ps(a[i * tile.a_row_stride]);
            SCATTERMOE_UNROLL for (int64_t v = 0; v < kTileVectors; ++v) {
                sum[i][v] = _mm512_fmadd_ps(factor, row[v], sum[i][v]);
            }
        }
    }
}

// kRows x 64 results from columns of a and rows of b: one number of a times vectors of b, added up over k.
template <int64_t kRows>
SCATTERMOE_AVX512 void outer_tile(const Tile& tile) {
    Sums<kRows> sum;
    __mmask16 mask[kTileVectors];
    SCATTERMOE_UNROLL for (int64_t v = 0; v < kTileVectors; ++v) {
        mask[v] = first_lanes(tile.columns - v * kLanes);
        SCATTERMOE_UNROLL for (int64_t i = 0; i < kRows; ++i) {
            sum[i][v] = _mm512_setzero_ps();
            // A weight's gradient is not in the cache yet; without this the stores would wait for it.
            __builtin_prefetch(tile.out + i * tile.out_stride + v * kLanes, /*write=*/1);
        }
    }
    if (tile.columns >= kTileVectors * kLanes) {
        add_outer_products<kRows, false>(sum, tile, mask);
    } else {
        add_outer_products<kRows, true>(sum, tile, mask);
    }
    SCATTERMOE_UNROLL for (int64_t i = 0; i < kRows; ++i) {
        SCATTERMOE_UNROLL for (int64_t v = 0; v < kTileVectors; ++v) {
            float* out = tile.out + i * tile.out_stride + v * kLanes;
            if (tile.accumulate) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(mask[v], out));
            if (mask[v] == 0xffff) {  // a store through a mask takes several times as long
                _mm512_storeu_ps(out, sum[i][v]);
            } else {
                _mm512_mask_storeu_ps(out, mask[v], sum[i][v]);
            }
        }
    }
}

// The sums of the lanes of four vectors.
SCATTERMOE_AVX512 inline __m128 sums_of_lanes(const __m512* x) {
    __m256 half[4];
    SCATTERMOE_UNROLL for (int64_t j = 0; j < 4; ++j) {
        half[j] = _mm256_add_ps(_mm512_castps512_ps256(x[j]),
                                _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x[j]), 1)));
    }
    const __m256 first = _mm256_add_ps(_mm256_unpacklo_ps(half[0], half[1]), _mm256_unpackhi_ps(half[0], half[1]));
    const __m256 second = _mm256_add_ps(_mm256_unpacklo_ps(half[2], half[3]), _mm256_unpackhi_ps(half[2], half[3]));
    const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44), _mm256_shuffle_ps(first, second, 0xee));
    return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

template <int64_t kRows, bool kMasked>
SCATTERMOE_AVX512 inline void add_inner_products(Sums<kRows>& sum, const Tile& tile, const float* const* b, int64_t p,
                                                 __mmask16 mask) {
    __m512 column[kTileVectors];
    SCATTERMOE_UNROLL for (int64_t j = 0; j < kTileVectors; ++j) {
        column[j] = load<kMasked>(b[j] + p, mask);
    }
    SCATTERMOE_UNROLL for (int64_t i = 0; i < kRows; ++i) {
        const __m512 row = load<kMasked>(tile.a + i * tile.a_row_stride + p, mask);
        SCATTERMOE_UNROLL for (int64_t j = 0; j < kTileVectors; ++j) {
            sum[i][j] = _mm512_fmadd_ps(row, column[j], sum[i][j]);
        }
    }
}

// kRows x 4 results from rows of a and columns of b: vectors of both multiplied, added up over k, then over the lanes.
template <int64_t kRows>
SCATTERMOE_AVX512 void inner_tile(const Tile& tile) {
    Sums<kRows> sum;
    const float* b[kTileVectors];
    SCATTERMOE_UNROLL for (int64_t j = 0; j < kTileVectors; ++j) {
        b[j] = tile.b + std::min(j, tile.columns - 1) * tile.b_stride;  // the last one again where there are fewer
        SCATTERMOE_UNROLL for (int64_t i = 0; i < kRows; ++i) sum[i][j] = _mm512_setzero_ps();
    }
    int64_t p = 0;
    for (; p + kLanes <= tile.k; p += kLanes) {
        _mm_prefetch(tile.next + p, _MM_HINT_T1);
        add_inner_products<kRows, false>(sum, tile, b, p, 0xffff);
    }
    if (p < tile.k) add_inner_products<kRows, true>(sum, tile, b, p, first_lanes(tile.k - p));

    const auto mask = static_cast<__mmask8>(first_lanes(std::min(tile.columns, kTileVectors)));
    SCATTERMOE_UNROLL for (int64_t i = 0; i < kRows; ++i) {
        float* out = tile.out + i * tile.out_stride;
        __m128 sums = sums_of_lanes(sum[i]);
        if (tile.accumulate) sums = _mm_add_ps(sums, _mm_maskz_loadu_ps(mask, out));
        if (mask == 0xf) {
            _mm_storeu_ps(out, sums);
        } else {
            _mm_mask_storeu_ps(out, mask, sums);
        }
    }
}

using TileKernel = void (*)(const Tile&);
constexpr TileKernel kOuterTiles[kTileRows] = {outer_tile<1>, outer_tile<2>, outer_tile<3>,
                                               outer_tile<4>, outer_tile<5>, outer_tile<6>};
constexpr TileKernel kInnerTiles[kTileRows] = {inner_tile<1>, inner_tile<2>, inner_tile<3>,
                                               inner_tile<4>, inner_tile<5>, inner_tile<6>};

}  // namespace

bool has_gemm_avx512() {
    return true;
}

void gemm_avx512(const Gemm& gemm) {
    const bool outer = gemm.b_column_stride == 1;
    const int64_t cached_rows = outer ? gemm.m : kCachedRows;
    const TileKernel* const kernels = outer ? kOuterTiles : kInnerTiles;
    const int64_t tile_columns = outer ? kTileVectors * kLanes : kTileVectors;
    // From one of the four loads of b in a tile to the next.
    const int64_t load_stride = outer ? kLanes : gemm.b_column_stride;
    Tile tile{};
    tile.out_stride = gemm.out_stride;
    tile.a_row_stride = gemm.a_row_stride;
    tile.a_column_stride = gemm.a_column_stride;
    tile.b_stride = outer ? gemm.b_row_stride : gemm.b_column_stride;
    for (int64_t first = 0; first < gemm.m; first += cached_rows) {
        const int64_t last = std::min(first + cached_rows, gemm.m);
        for (int64_t p = 0; p < gemm.k; p += kDepth) {
            tile.k = std::min(kDepth, gemm.k - p);
            tile.accumulate = gemm.accumulate || p > 0;
            for (int64_t j = 0; j < gemm.n; j += tile_columns) {
                tile.b = gemm.b + p * gemm.b_row_stride + j * gemm.b_column_stride;
                tile.columns = gemm.n - j;
                for (int64_t i = first; i < last; i += kTileRows) {
                    tile.out = gemm.out + i * gemm.out_stride + j;
                    tile.a = gemm.a + i * gemm.a_row_stride + p * gemm.a_column_stride;
                    // Each of the first four tiles prefetches a quarter of the next columns of b: all of them at once
                    // are more than can be under way. Without anything to come, it is b again, which costs nothing.
                    const int64_t load = (i - first) / kTileRows;
                    const bool has_next = load < kTileVectors && j + 2 * tile_columns <= gemm.n;
                    tile.next = has_next ? tile.b + tile_columns * gemm.b_column_stride + load * load_stride : tile.b;
                    kernels[std::min(kTileRows, last - i) - 1](tile);
                }
            }
        }
    }
}

}  // namespace scattermoe::cpu

#else

namespace scattermoe::cpu {

bool has_gemm_avx512() {
    return false;
}

void gemm_avx512(const Gemm& /*gemm*/) {}

}  // namespace scattermoe::cpu

#endif
