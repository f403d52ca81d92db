#include "../launch.h"

namespace scattermoe::kernels::sm90 {

SCATTERMOE_WEIGHT_GRAD(kPingPong128x192, kNeither, kPlain);

}  // namespace scattermoe::kernels::sm90
