#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_WEIGHT_GRAD(kPaired128x256, kLeft, kTransposed);

}  // namespace scattermoe::kernels::sm90
