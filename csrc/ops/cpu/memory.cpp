#include "memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace scattermoe::cpu {

namespace {

at::Tensor with_huge_pages(at::Tensor tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
    const auto data = reinterpret_cast<uintptr_t>(tensor.data_ptr());
    // Whole huge pages only, so that nothing beside the tensor gets more memory than it touches.
    const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (data + tensor.nbytes()) / kHugePage * kHugePage;
    // A hint: where the system refuses it, the tensor works all the same.
    if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
    return tensor;
}

}  // namespace

at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
    return with_huge_pages(at::empty(sizes, options));
}

at::Tensor empty_like(const at::Tensor& tensor) {
    return with_huge_pages(at::empty_like(tensor));
}

}  // namespace scattermoe::cpu
