/* The ports of a console device (virtio 1.2, section 5.3.6), between guest memory and file
 * descriptors of the host. Bytes are read and written where they lie in guest memory.
 *
 * One thread serves all ports. Neither side is read before the other can take it: a chain with
 * output goes back when the host took all of it, and input is read when the driver has room. */
#ifndef PYVMM_VIRTIO_CONSOLE_H
#define PYVMM_VIRTIO_CONSOLE_H

#include <stdbool.h>
#include <stdint.h>

#include "console_watch.h"
#include "guest_mem.h"
#include "virtio_irq.h"
#include "virtq.h"

#define VIRTIO_CONSOLE_MAX_QUEUE_SIZE 512u /* a vector of two has to fit into one system call */

struct virtio_console_counters {
    uint64_t rx_bytes;   /* given to the driver */
    uint64_t tx_bytes;   /* given to the host */
    uint64_t tx_dropped; /* bytes for which there was nobody */
    uint64_t interrupts;
    uint64_t malformed; /* chains that the rings returned or dropped by themselves */
};

enum virtio_console_result {
    VIRTIO_CONSOLE_STOPPED, /* by virtio_console_stop */
    VIRTIO_CONSOLE_BROKEN,  /* a ring can no longer be followed */
    /* or -errno: the device cannot go on */
};

struct virtio_console;

/* A console of `port_count` ports, none of which has queues or is connected yet. `news_fd` is an eventfd that is
 * signalled when virtio_console_take_lost has something to say; `memory` and `irq` must outlive
 * the console. NULL with errno set on failure. */
struct virtio_console *virtio_console_create(uint32_t port_count, const struct guest_mem *memory,
                                             struct virtio_irq *irq, int news_fd);
void virtio_console_destroy(struct virtio_console *console);

/* The queues of a port that the driver configured, and the eventfds of their notifications. Before
 * the first run. 0 or -errno: -EINVAL when virtq_init refuses a configuration. */
int virtio_console_set_queues(struct virtio_console *console, uint32_t port,
                              const struct virtq_config *rx, int rx_kick,
                              const struct virtq_config *tx, int tx_kick);

/* --- any thread, for ports with queues and without ---------------------------------------- */

/* Connects the port, which is not connected, to descriptors that must not block (sockets may); -1
 * is none: without `in_fd` there is no input, without `out_fd` output is dropped. Where they are
 * the same, it is a connection, and its end is news (virtio_console_take_lost); elsewhere the end
 * of input is just that, and output that fails is dropped. 0 or -errno. */
int virtio_console_connect(struct virtio_console *console, uint32_t port, int in_fd, int out_fd);

/* Lets go of the port's descriptors; what the driver has sent and they did not take is dropped.
 * Idempotent. */
void virtio_console_disconnect(struct virtio_console *console, uint32_t port);

/* Whether the driver's side is open: before, no input is read. */
void virtio_console_set_open(struct virtio_console *console, uint32_t port, bool open);

/* `watch`, which must outlive the console, sees the output of the port; NULL ends that. */
void virtio_console_set_watch(struct virtio_console *console, uint32_t port,
                              struct console_watch *watch);

/* The next port whose connection has come to its end, all its input having been given to the
 * driver; -1: there is no more. The port has to be disconnected. */
int virtio_console_take_lost(struct virtio_console *console);

struct virtio_console_counters virtio_console_counters(struct virtio_console *console);

/* ------------------------------------------------------------------------------------------ */

/* Serves the ports until virtio_console_stop: an enum virtio_console_result or -errno. After its
 * return guest memory is not touched any more. */
int virtio_console_run(struct virtio_console *console);

/* Makes virtio_console_run return; one that has not started yet, after a look at the queues. Any
 * thread. */
void virtio_console_stop(struct virtio_console *console);

#endif
