/* How fast the host's time stamp counter runs. */
#ifndef PYVMM_HOST_TSC_H
#define PYVMM_HOST_TSC_H

#include <stdint.h>

/* kHz, to some millionths; measured, which takes 20 ms. */
uint32_t host_tsc_khz(void);

#endif
