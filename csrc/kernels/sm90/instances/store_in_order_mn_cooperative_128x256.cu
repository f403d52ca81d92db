#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_GROUPED_GEMM(kCooperative128x256, kInOrder, kMn, kStore);

}  // namespace scattermoe::kernels::sm90
