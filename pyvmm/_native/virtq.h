/* Device side of a split virtqueue (virtio 1.2, section 2.7).
 *
 * Everything in the rings is written by a hostile guest: each field is read once into a local,
 * checked against guest memory, and each chain is bounded by the queue size.
 *
 *   pop ... pop   take chains that the driver made available
 *   push ... push fill used entries, invisible to the driver yet
 *   publish       make them visible at once and say whether the driver wants an interrupt
 *
 * One thread at a time may use a queue. */
#ifndef PYVMM_VIRTQ_H
#define PYVMM_VIRTQ_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "guest_mem.h"

/* What the driver configured; gpa values are guest-physical addresses. */
struct virtq_config {
    uint64_t desc_gpa;
    uint64_t avail_gpa;
    uint64_t used_gpa;
    uint16_t size;
    bool event_idx; /* VIRTIO_F_EVENT_IDX negotiated */
    bool indirect;  /* VIRTIO_F_INDIRECT_DESC negotiated */
};

struct virtq {
    const struct guest_mem *mem;
    const void *desc; /* struct vring_desc[size] in guest memory */
    void *avail;      /* struct vring_avail in guest memory */
    void *used;       /* struct vring_used in guest memory */
    uint16_t size;
    bool event_idx;
    bool indirect;
    bool broken;             /* the ring can no longer be followed; only a reset helps */
    uint16_t avail_idx;      /* avail->idx as last read: entries before it may be taken */
    uint16_t next_avail;     /* free-running index of the next available entry to take */
    uint16_t next_used;      /* free-running index of the next used entry to fill */
    uint16_t published_used; /* used->idx as the driver sees it */
    uint64_t chains;         /* chains popped since init */
    uint64_t malformed;      /* chains returned with length 0, or dropped, without being popped */
};

/* A popped chain: iov[0 .. readable) are device-readable, the `writable` entries after them are
 * device-writable. All of them lie in guest memory and none is empty: descriptors of length 0
 * are left out. */
struct virtq_chain {
    uint16_t head;
    uint16_t readable;
    uint16_t writable;
    uint32_t readable_bytes;
    uint32_t writable_bytes;
    struct iovec *iov; /* caller's storage, at least `size` entries of the queue */
};

enum virtq_result {
    VIRTQ_BROKEN = -1,
    VIRTQ_EMPTY = 0,
    VIRTQ_CHAIN = 1,
};

/* 0, or -EINVAL when size is not a power of two up to 32768, an address is misaligned, or a ring
 * is not wholly in guest memory. */
int virtq_init(struct virtq *vq, const struct guest_mem *mem, const struct virtq_config *config);

/* Takes the next available chain. A malformed chain (descriptor outside guest memory, loop,
 * longer than the queue, nested or misplaced indirect table, readable after writable, more than
 * 2^32-1 bytes) is pushed with length 0 and skipped, so publish also after VIRTQ_EMPTY; a head
 * outside the table is dropped.
 *
 * At most `size` chains are taken and not yet published, else the queue breaks. A hostile driver
 * may make one head available twice, so a device keeps its state by its own slots (`size` of
 * them are enough), not by head. A dropped head is never returned and keeps its place in that
 * count. */
enum virtq_result virtq_pop(struct virtq *vq, struct virtq_chain *chain);

/* Fills the used entry of `head`: `written` bytes of its device-writable part were written. */
void virtq_push(struct virtq *vq, uint16_t head, uint32_t written);

/* Makes all pushed entries visible. True when the driver wants an interrupt for them. */
bool virtq_publish(struct virtq *vq);

/* Asks the driver not to notify (a hint: notifications may still come). */
void virtq_disable_notify(struct virtq *vq);

/* Asks for a notification of the next chain. True when chains came in meanwhile: pop again.
 * Never true once the queue is broken. */
bool virtq_enable_notify(struct virtq *vq);

/* A queue, and whether its driver was asked to notify of the chain after armed_at. */
struct virtq_side {
    struct virtq vq;
    bool armed;
    uint16_t armed_at;
    int kick_fd;
};

/* virtq_pop with notifications: they are off while chains come, and when there is none and one is
 * `needed`, the driver is asked to notify of it. Begins with notifications disabled. */
enum virtq_result virtq_side_pop(struct virtq_side *side, struct virtq_chain *chain, bool needed);

#endif
