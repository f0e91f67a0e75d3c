// Any processor.
#include "operations.h"

#define SEGUE_VNNI 0

namespace segue::portable {
namespace {
#include "vector_portable.h"
#include "math.h"
#include "linear.h"
#include "attention.h"
}  // namespace
const Operations operations = {"portable", linear, rotate_and_write, attend};
}  // namespace segue::portable
