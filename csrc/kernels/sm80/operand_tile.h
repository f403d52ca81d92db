#pragma once

// One operand of a block's tile in shared memory: its swizzled layout, the copy into it and the fragments out of it.

#include <cuda_runtime.h>

#include <cstdint>

#include "../ptx/cp_async.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/mma.h"
#include "../select.h"
#include "../types.h"
#include "../vector.h"

namespace scattermoe::kernels::sm80 {

inline constexpr int kChunkBytes = kVectorBytes;  // what one cp.async or one row of ldmatrix moves

// A tile of kMn x (kKBytes of the contraction). kMajor K: kMn rows, each kKBytes long. kMajor MN: a row for each
// element of the contraction, each kMn elements long. Chunks of a row are permuted by XOR with a number that depends on
// the row, so that the eight rows an ldmatrix reads at once, or the 32 words of a TF32 fragment, lie in different
// banks.
template <typename Element, Major kMajor, int kMn, int kKBytes>
struct OperandTile {
    static constexpr int kK = kKBytes / static_cast<int>(sizeof(Element));
    static constexpr int kRows = kMajor == Major::kK ? kMn : kK;
    static constexpr int kPitch = kMajor == Major::kK ? kKBytes : kMn * static_cast<int>(sizeof(Element));
    static constexpr int kBytes = kRows * kPitch;
    static constexpr int kChunks = kPitch / kChunkBytes;  // of a row
    static constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Element));
    // Fragments with the contraction across rows are transposed by ldmatrix for 16-bit elements; 32-bit ones are read
    // word by word, four rows of eight words at a time.
    static constexpr bool kWordwise = kMajor == Major::kMn && sizeof(Element) == 4;
    static_assert(kChunks >= 8 || (kChunks == 4 && kMajor == Major::kK));

    static constexpr int kSwizzlePeriod = kWordwise ? 4 : 8;  // rows after which the permutation repeats
    __device__ __forceinline__ static int swizzle(int row) {
        if constexpr (kWordwise) {
            return (row & 3) << 1;
        } else if constexpr (kChunks == 4) {
            return (row >> 1) & 3;  // two rows of 64 bytes cover the banks once
        } else {
            return row & 7;
        }
    }
    __device__ __forceinline__ static int offset(int row, int chunk) {
        return row * kPitch + ((chunk ^ swizzle(row)) * kChunkBytes);
    }
};

enum class Operand { kA, kB };

// Reads fragments of 16 (m or n) x 32 bytes (k) for mma_16x8: all of A's, or two of B's side by side in n.
template <typename Element, Major kMajor, int kMn, int kKBytes, Operand kOperand>
class FragmentReader {
    using Tile = OperandTile<Element, kMajor, kMn, kKBytes>;
    static constexpr int kStepElements = 32 / static_cast<int>(sizeof(Element));

  public:
    // warp_mn: where the warp's part of the tile starts. Its extent is a power of two, so that in every address below
    // the block and step only set bits that are zero in the warp's start, and XOR commutes with the swizzle.
    __device__ __forceinline__ FragmentReader(int warp_mn, int lane) {
        // Registers 0..3 hold, for A, (mn, k) = (low, low), (high, low), (low, high), (high, high), and for B with the
        // middle two exchanged.
        const int matrix = lane / 8, row = lane % 8;
        const int mn_half = kOperand == Operand::kA ? matrix % 2 : matrix / 2;
        const int k_half = kOperand == Operand::kA ? matrix / 2 : matrix % 2;
        if constexpr (Tile::kWordwise) {
            const int mn = warp_mn + lane / 4;
            lane_offset_ = Tile::offset(lane % 4, mn / 4) + mn % 4 * 4;
        } else if constexpr (kMajor == Major::kK) {
            lane_offset_ = Tile::offset(warp_mn + mn_half * 8 + row, k_half);
        } else {
            lane_offset_ = Tile::offset(k_half * 8 + row, warp_mn / 8 + mn_half);
        }
    }

    __device__ __forceinline__ void load(uint32_t (&fragment)[4], uint32_t tile, int block, int step) const {
        if constexpr (Tile::kWordwise) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int mn_half = kOperand == Operand::kA ? i % 2 : i / 2;
                const int k_half = kOperand == Operand::kA ? i / 2 : i % 2;
                const int chunk = block * 4 + mn_half * 2;
                fragment[i] = ptx::load_shared_32(tile + (lane_offset_ ^ (chunk * kChunkBytes)) +
                                                  (step * kStepElements + k_half * 4) * Tile::kPitch);
            }
        } else if constexpr (kMajor == Major::kK) {
            ptx::ldmatrix_x4(fragment, tile + (lane_offset_ ^ (step * 2 * kChunkBytes)) + block * 16 * Tile::kPitch);
        } else {
            ptx::ldmatrix_x4_trans(
                fragment, tile + (lane_offset_ ^ (block * 2 * kChunkBytes)) + step * kStepElements * Tile::kPitch);
        }
        if constexpr (sizeof(Element) == 4) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                fragment[i] = ptx::round_to_tf32(fragment[i]);
        }
    }

  private:
    int lane_offset_;
};

// Writes one chunk of which the first `valid` elements are read and the others become zero. With kAligned by cp.async;
// else element by element through registers, for rows that start anywhere.
template <bool kAligned, typename Element>
__device__ __forceinline__ void copy_chunk(uint32_t shared, const Element* source, int valid) {
    if constexpr (kAligned) {
        ptx::cp_async_16(shared, source, valid * static_cast<int>(sizeof(Element)));
    } else {
        constexpr int kElements = kChunkBytes / static_cast<int>(sizeof(Element));
        Vector<Element, kElements> chunk = Vector<Element, kElements>::zero();
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
            if (i < valid) chunk.elements[i] = source[i];
        }
        ptx::store_shared_128(shared, *reinterpret_cast<const uint4*>(&chunk));
    }
}

// How the threads of a block share the chunks of an operand's tile: thread t always copies the same chunk of a row, of
// every kRowsPerPass-th row.
template <typename Tile, int kThreads>
struct CopyShape {
    static_assert(kThreads % Tile::kChunks == 0);
    static constexpr int kRowsPerPass = kThreads / Tile::kChunks;
    static_assert(Tile::kRows % kRowsPerPass == 0 && kRowsPerPass % Tile::kSwizzlePeriod == 0);
    static constexpr int kPasses = Tile::kRows / kRowsPerPass;
    static constexpr int kPassBytes = kRowsPerPass * Tile::kPitch;
};

// Elements of a chunk that starts `begin` into a row of `size`.
template <int kElements>
__device__ __forceinline__ int valid_elements(int size, int begin) {
    return max(0, min(kElements, size - begin));
}

// Copies k-blocks of an operand whose rows hold the contraction. The rows stay the same from one k-block to the next.
template <typename Element, int kMn, int kKBytes, int kThreads, bool kAligned>
class RowsCopy {
    using Tile = OperandTile<Element, Major::kK, kMn, kKBytes>;
    using Shape = CopyShape<Tile, kThreads>;

  public:
    // row_of(i): the row of memory for row i of the tile. Rows beyond the operand's end must be mapped to one inside:
    // their products end in output that is not stored.
    template <typename RowOf>
    __device__ __forceinline__ RowsCopy(const Element* base, int64_t stride, int k, RowOf row_of)
        : stride_(stride), k_left_(k - chunk() * Tile::kChunkElements) {
        base_ = base + chunk() * Tile::kChunkElements;
#pragma unroll
        for (int i = 0; i < Shape::kPasses; ++i)
            rows_[i] = row_of(row() + i * Shape::kRowsPerPass);
    }

    // Starts the copy of the next k-block.
    __device__ __forceinline__ void issue(uint32_t tile) {
        const uint32_t target = tile + Tile::offset(row(), chunk());
        const int valid = valid_elements<Tile::kChunkElements>(k_left_, 0);
#pragma unroll
        for (int i = 0; i < Shape::kPasses; ++i) {
            copy_chunk<kAligned>(target + i * Shape::kPassBytes, base_ + rows_[i] * stride_, valid);
        }
        base_ += Tile::kK;
        k_left_ -= Tile::kK;
    }

  private:
    __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::kChunks; }
    __device__ __forceinline__ static int row() { return threadIdx.x / Tile::kChunks; }

    const Element* base_;
    int64_t stride_;
    int k_left_;
    int32_t rows_[Shape::kPasses];
};

// Copies k-blocks of an operand whose rows run along the contraction: a k-block is the next Tile::kRows rows, found
// through row_of (whose results are fetched one k-block ahead). Rows past the end become zero.
template <typename Element, int kMn, int kKBytes, int kThreads, bool kAligned, typename RowOf>
class DepthCopy {
    using Tile = OperandTile<Element, Major::kMn, kMn, kKBytes>;
    using Shape = CopyShape<Tile, kThreads>;

  public:
    // The rows [0, depth) of the contraction, and of each the columns [column, column + kMn) of `columns`.
    __device__ __forceinline__ DepthCopy(const Element* base, int64_t stride, int column, int columns, int depth,
                                         RowOf row_of)
        : stride_(stride), depth_(depth), next_(row()), row_of_(row_of) {
        column += chunk() * Tile::kChunkElements;
        valid_ = valid_elements<Tile::kChunkElements>(columns, column);
        base_ = base + (valid_ > 0 ? column : 0);
        fetch_rows();
    }

    __device__ __forceinline__ void issue(uint32_t tile) {
        const uint32_t target = tile + Tile::offset(row(), chunk());
#pragma unroll
        for (int i = 0; i < Shape::kPasses; ++i) {
            const int valid = next_ + i * Shape::kRowsPerPass < depth_ ? valid_ : 0;
            copy_chunk<kAligned>(target + i * Shape::kPassBytes, base_ + rows_[i] * stride_, valid);
        }
        next_ += Tile::kRows;
        fetch_rows();
    }

  private:
    __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::kChunks; }
    __device__ __forceinline__ static int row() { return threadIdx.x / Tile::kChunks; }

    __device__ __forceinline__ void fetch_rows() {
#pragma unroll
        for (int i = 0; i < Shape::kPasses; ++i) {
            const int k = next_ + i * Shape::kRowsPerPass;
            rows_[i] = k < depth_ ? row_of_(k) : 0;
        }
    }

    const Element* base_;
    int64_t stride_;
    int depth_;
    int next_;
    int valid_;
    RowOf row_of_;
    int32_t rows_[Shape::kPasses];
};

}  // namespace scattermoe::kernels::sm80
