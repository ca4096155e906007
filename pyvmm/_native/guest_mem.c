#include "guest_mem.h"
