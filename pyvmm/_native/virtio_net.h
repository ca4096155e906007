/* The network device's pairs of queues (virtio 1.2, section 5.1.6), between guest memory and a port
 * (net_port.h). Frames on its file descriptor are read and written where they lie in guest memory;
 * nothing is copied but what did not fit where it was expected. */
#ifndef PYVMM_VIRTIO_NET_H
#define PYVMM_VIRTIO_NET_H

#include <stdbool.h>
#include <stdint.h>

#include "guest_mem.h"
#include "net_filter.h"
#include "net_port.h"
#include "virtio_irq.h"
#include "virtq.h"

#define VIRTIO_NET_MAX_QUEUE_SIZE 512u /* a chain has to fit into one system call */

/* What all pairs of a device share. It outlives them, and only what says so changes meanwhile. */
struct virtio_net_device {
    enum net_framing framing;
    struct net_engine *engine; /* NET_FRAMING_CALLS, else NULL */
    bool vnet_hdr;        /* each frame on the port follows a struct virtio_net_hdr_v1 */
    bool mergeable;       /* VIRTIO_NET_F_MRG_RXBUF negotiated */
    uint32_t tx_offloads; /* NET_OFFLOAD_...: what frames of the driver may be */
    uint32_t rx_offloads; /* and frames for it; see virtio_net_set_rx_offloads */
    bool link_up;         /* see virtio_net_set_link */
    int pcap_fd;          /* where frames are recorded (net_pcap.h), or -1 */
    struct net_filter filter;
};

struct virtio_net_counters {
    uint64_t rx_frames; /* given to the driver */
    uint64_t rx_bytes;
    uint64_t rx_dropped;  /* too long for the driver's buffers, too short, or not negotiated */
    uint64_t rx_filtered; /* not for this driver, or without a link */
    uint64_t rx_spilled;  /* of rx_frames, those that were copied in part */
    uint64_t tx_frames;   /* given to the port */
    uint64_t tx_bytes;
    uint64_t tx_dropped; /* malformed, refused by the port, or without a link */
    uint64_t tx_waits;   /* how often the port was full */
    uint64_t interrupts;
    uint64_t malformed; /* chains that the rings returned or dropped by themselves */
};

/* The longest that stands on a port for one frame: an Ethernet header with two VLAN tags, an IP
 * packet of the largest size, and before it a virtio_net_hdr_v1 and a length. */
#define VIRTIO_NET_MAX_FRAME (14u + 8u + 65535u)
#define VIRTIO_NET_MAX_MESSAGE (4u + 12u + VIRTIO_NET_MAX_FRAME)

/* NET_FRAMING_STREAM: where a pair left the stream, for the next one to go on from there. A driver
 * may reset its device in the middle of a frame, and all that follows would be misread. At first
 * all zero. */
struct virtio_net_stream {
    uint8_t prefix[4]; /* the length of the next frame, as far as it has been read */
    uint32_t prefix_got;
    uint32_t skip; /* bytes of a frame that nobody waits for any more */
    uint32_t unsent_from, unsent_to;
    uint8_t unsent[VIRTIO_NET_MAX_MESSAGE]; /* the rest of a frame that was sent in part */
};

enum virtio_net_result {
    VIRTIO_NET_STOPPED, /* by virtio_net_pair_stop; virtio_net_pair_run may be called again */
    VIRTIO_NET_BROKEN,  /* a ring can no longer be followed */
    VIRTIO_NET_GONE,    /* the port's peer has gone; run again, frames are dropped from now on */
    /* or -errno: the pair cannot go on */
};

struct virtio_net_pair;

/* Both take effect with the next frame. Any thread. */
void virtio_net_set_rx_offloads(struct virtio_net_device *device, uint32_t offloads);
void virtio_net_set_link(struct virtio_net_device *device, bool up);

/* A receive and a transmit queue that the driver configured, on `fd` of the port, or -1 if that has
 * an engine, which then is this pair's alone. The kick descriptors are the eventfds of their notifications; `memory`, `irq`, `device` and `stream`,
 * which is NULL for ports of another framing, must outlive the pair. NULL with errno set on
 * failure: EINVAL when virtq_init refuses a configuration. */
struct virtio_net_pair *virtio_net_pair_create(struct virtio_net_device *device, int fd,
                                               struct virtio_net_stream *stream,
                                               const struct guest_mem *memory,
                                               const struct virtq_config *rx, int rx_kick,
                                               const struct virtq_config *tx, int tx_kick,
                                               struct virtio_irq *irq);
void virtio_net_pair_destroy(struct virtio_net_pair *pair);

/* Serves the pair until it is stopped, broken or without a peer: an enum virtio_net_result or
 * -errno. After its return guest memory is not touched any more. */
int virtio_net_pair_run(struct virtio_net_pair *pair);

/* Makes virtio_net_pair_run return; one that has not started yet, after a look at the queues. Any
 * thread. */
void virtio_net_pair_stop(struct virtio_net_pair *pair);

/* Any thread. */
struct virtio_net_counters virtio_net_pair_counters(const struct virtio_net_pair *pair);

#endif
