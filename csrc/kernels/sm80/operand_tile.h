#pragma once

// One operand of a block's tile in shared memory: its swizzled layout, the copy into it and the fragments out of it.

#include <cuda_runtime.h>

#include <cstdint>

#include "../grouped_gemm.h"
#include "../ptx/cp_async.h"
#include "../ptx/ldmatrix.h"
#include "../ptx/mma.h"
#include "../ptx/shared_memory.h"
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

// Writes one whole chunk. With kAligned by cp.async; else element by element through registers, for rows that start
// anywhere.
template <typename Element, bool kAligned>
__device__ __forceinline__ void copy_chunk(uint32_t shared, const void* source) {
    if constexpr (kAligned) {
        ptx::cp_async_16(shared, source);
    } else {
        Vector<Element, kChunkBytes / static_cast<int>(sizeof(Element))> chunk;
#pragma unroll
        for (int i = 0; i < chunk.size(); ++i)
            chunk.elements[i] = static_cast<const Element*>(source)[i];
        ptx::store_shared_128(shared, __builtin_bit_cast(uint4, chunk));
    }
}

// Writes one chunk of which the first `valid` elements are read and the others become zero.
template <typename Element, bool kAligned>
__device__ __forceinline__ void copy_chunk(uint32_t shared, const void* source, int valid) {
    if constexpr (kAligned) {
        ptx::cp_async_16(shared, source, valid * static_cast<int>(sizeof(Element)));
    } else {
        auto chunk = Vector<Element, kChunkBytes / static_cast<int>(sizeof(Element))>::zero();
#pragma unroll
        for (int i = 0; i < chunk.size(); ++i) {
            if (i < valid) chunk.elements[i] = static_cast<const Element*>(source)[i];
        }
        ptx::store_shared_128(shared, __builtin_bit_cast(uint4, chunk));
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

    __device__ __forceinline__ static int chunk() { return threadIdx.x % Tile::kChunks; }
    __device__ __forceinline__ static int row() { return threadIdx.x / Tile::kChunks; }
    __device__ __forceinline__ static int shared_offset() { return Tile::offset(row(), chunk()); }
};

// Elements of a chunk that lie before the end of a row.
template <int kElements>
__device__ __forceinline__ int valid_elements(int left) {
    return max(0, min(kElements, left));
}

// A matrix with its rows so many bytes apart. The stride fits 32 bits, so that a row's address is one multiply-add; the
// product has 64.
struct MatrixView {
    const unsigned char* data;
    uint32_t row_bytes;

    template <typename Element>
    __device__ __forceinline__ MatrixView(const Element* base, int64_t stride)
        : data(reinterpret_cast<const unsigned char*>(base)),
          row_bytes(static_cast<uint32_t>(stride * static_cast<int64_t>(sizeof(Element)))) {}

    __device__ __forceinline__ const unsigned char* row(int32_t index) const {
        return data + static_cast<uint64_t>(static_cast<uint32_t>(index)) * row_bytes;
    }
};

// The copies below issue a k-block in kParts parts, which the mainloop spreads over its steps. The first whole_blocks()
// k-blocks can be issued with kWhole, without the instructions that find out where to write zeros.
template <int kPasses, int kPart, int kParts>
struct PartOfPasses {
    static constexpr int kBegin = kPasses * kPart / kParts;
    static constexpr int kEnd = kPasses * (kPart + 1) / kParts;
};

// Copies k-blocks of an operand whose rows hold the contraction. The rows stay the same from one k-block to the next.
template <typename Element, int kMn, int kKBytes, int kThreads, bool kAligned>
class RowsCopy {
    using Tile = OperandTile<Element, Major::kK, kMn, kKBytes>;
    using Shape = CopyShape<Tile, kThreads>;

  public:
    // row_of(i): the row of memory for row i of the tile. Rows beyond the operand's end must be mapped to one inside:
    // their products end in output that is not stored.
    template <typename RowOf>
    __device__ __forceinline__ RowsCopy(MatrixView matrix, int k, RowOf row_of) : matrix_(matrix), k_left_(k) {
        matrix_.data += Shape::chunk() * kChunkBytes;
#pragma unroll
        for (int i = 0; i < Shape::kPasses; ++i)
            rows_[i] = row_of(Shape::row() + i * Shape::kRowsPerPass);
    }

    // Before anything is issued.
    __device__ __forceinline__ int whole_blocks() const { return k_left_ / Tile::kK; }

    // Starts a part of the next k-block's copy.
    template <int kPart, int kParts, bool kWhole>
    __device__ __forceinline__ void issue(uint32_t tile) {
        using Part = PartOfPasses<Shape::kPasses, kPart, kParts>;
        const uint32_t target = tile + Shape::shared_offset();
        const int valid = valid_elements<Tile::kChunkElements>(k_left_ - Shape::chunk() * Tile::kChunkElements);
#pragma unroll
        for (int i = Part::kBegin; i < Part::kEnd; ++i) {
            if constexpr (kWhole) {
                copy_chunk<Element, kAligned>(target + i * Shape::kPassBytes, matrix_.row(rows_[i]));
            } else {
                copy_chunk<Element, kAligned>(target + i * Shape::kPassBytes, matrix_.row(rows_[i]), valid);
            }
        }
        if constexpr (kPart == kParts - 1) {
            matrix_.data += kKBytes;
            k_left_ -= Tile::kK;
        }
    }

  private:
    MatrixView matrix_;
    int k_left_;  // elements of the contraction from the next k-block on
    int32_t rows_[Shape::kPasses];
};

// The rows of a contraction that lie one after the other.
struct AdjacentRows {
    __device__ __forceinline__ int32_t fetch(int k) const { return k; }
    __device__ __forceinline__ int32_t resolve(int32_t fetched) const { return fetched; }
};

// The rows of a contraction over grouped positions, found through a map. What is read from memory is kept apart from
// what is computed from it, so that a k-block passes between the two.
struct PositionRows {
    RowMap map;
    int32_t begin;

    __device__ __forceinline__ int32_t fetch(int k) const { return map.fetch(begin + k); }
    __device__ __forceinline__ int32_t resolve(int32_t fetched) const { return map.resolve(fetched); }
};

// Copies k-blocks of an operand whose rows run along the contraction: a k-block is the next Tile::kRows rows. Rows past
// the end become zero.
template <typename Element, int kMn, int kKBytes, int kThreads, bool kAligned, typename Rows>
class DepthCopy {
    using Tile = OperandTile<Element, Major::kMn, kMn, kKBytes>;
    using Shape = CopyShape<Tile, kThreads>;

  public:
    // The rows [0, depth) of the contraction, at least one, and of each the columns [column, column + kMn) of
    // `columns`.
    __device__ __forceinline__ DepthCopy(MatrixView matrix, int column, int columns, int depth, Rows rows)
        : matrix_(matrix), depth_(depth), next_(Shape::row()), whole_columns_(column + kMn <= columns), rows_(rows) {
        column += Shape::chunk() * Tile::kChunkElements;
        valid_ = valid_elements<Tile::kChunkElements>(columns - column);
        if (valid_ > 0) matrix_.data += column * static_cast<int64_t>(sizeof(Element));
#pragma unroll
        for (int i = 0; i < Shape::kPasses; ++i)
            fetch(i, next_);
    }

    __device__ __forceinline__ int whole_blocks() const { return whole_columns_ ? depth_ / Tile::kRows : 0; }

    template <int kPart, int kParts, bool kWhole>
    __device__ __forceinline__ void issue(uint32_t tile) {
        using Part = PartOfPasses<Shape::kPasses, kPart, kParts>;
        const uint32_t target = tile + Shape::shared_offset();
#pragma unroll
        for (int i = Part::kBegin; i < Part::kEnd; ++i) {
            const unsigned char* const source = matrix_.row(rows_.resolve(fetched_[i]));
            if constexpr (kWhole) {
                copy_chunk<Element, kAligned>(target + i * Shape::kPassBytes, source);
            } else {
                const int valid = next_ + i * Shape::kRowsPerPass < depth_ ? valid_ : 0;
                copy_chunk<Element, kAligned>(target + i * Shape::kPassBytes, source, valid);
            }
            fetch(i, next_ + Tile::kRows);
        }
        if constexpr (kPart == kParts - 1) next_ += Tile::kRows;
    }

  private:
    // Reads where a row of the k-block at `first` lies, one k-block before it is needed. Past the end, where zeros are
    // written, any row will do.
    __device__ __forceinline__ void fetch(int i, int first) {
        fetched_[i] = rows_.fetch(min(first + i * Shape::kRowsPerPass, depth_ - 1));
    }

    MatrixView matrix_;
    int depth_;
    int next_;  // this thread's first row of the next k-block
    int valid_;
    bool whole_columns_;
    Rows rows_;
    int32_t fetched_[Shape::kPasses];
};

}  // namespace scattermoe::kernels::sm80
