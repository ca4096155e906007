/* A 16550A UART (PC16550D data sheet): the guest's COM1. Every register access is answered here,
 * on the vCPU's thread; the worker only waits for the host side to become readable or writable. */
#ifndef PYVMM_SERIAL16550_H
#define PYVMM_SERIAL16550_H

#include "console_watch.h"
#include "io_bus.h"
#include "worker.h"

struct serial16550;

/* in_fd and out_fd may be -1; they are two descriptors, also where they name one file. in_fd must
 * be pollable (no regular file); it is not read before a driver listens. The interrupt line is GSI `gsi` of the VM `vm_fd`; a
 * vm_fd of -1 leaves it unconnected. NULL with errno set on failure. */
struct serial16550 *serial16550_create(uint64_t port, int in_fd, int out_fd, int vm_fd,
                                       uint32_t gsi, struct console_watch *watch);

/* The worker that serves in_fd and out_fd: run it on a thread of its own. */
struct worker *serial16550_worker(struct serial16550 *serial);
struct io_range *serial16550_range(struct serial16550 *serial);

/* Writes out what the transmitter still holds. */
void serial16550_flush(struct serial16550 *serial);

/* The worker must have stopped, and no vCPU may run. */
void serial16550_destroy(struct serial16550 *serial);

#endif
