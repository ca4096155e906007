/* A port carries Ethernet frames: how they stand on its file descriptor, or who makes and takes them
 * where it has none, and what they may be. */
#ifndef PYVMM_NET_PORT_H
#define PYVMM_NET_PORT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

enum net_framing {
    NET_FRAMING_TAP,    /* read and write, one frame each */
    NET_FRAMING_PACKET, /* a message of a datagram or seqpacket socket; an empty one ends it */
    NET_FRAMING_STREAM, /* of a stream socket: the length in 4 bytes, big-endian, then the frame */
    NET_FRAMING_CALLS,  /* no descriptor, but calls of a struct net_engine */
};

/* Takes a frame of an engine for the driver, whose checksums are right. False while the driver has
 * no buffers for it: the engine keeps it, and offers it again when it next serves. */
typedef bool (*net_deliver)(void *opaque, const void *frame, size_t size);

/* The data of an engine's descriptor in the epoll set. */
#define NET_ENGINE_EVENT(fd) ((uint64_t)(uint32_t)(fd) << 32 | 2u)

/* Code that is the other end of the cable, and runs on the thread of the queues: nothing is handed
 * over to another one. All calls come from that thread, between attach and detach. It may live in
 * an extension module of its own. */
struct net_engine {
    /* From now on frames go to `deliver`, and what is to be waited for into `epoll_fd`, as
     * NET_ENGINE_EVENT. */
    void (*attach)(struct net_engine *engine, int epoll_fd, net_deliver deliver, void *opaque);
    void (*detach)(struct net_engine *engine);
    /* Takes a frame of the driver, which is read once. False while it keeps frames of its own for
     * which there were no buffers. */
    bool (*take)(struct net_engine *engine, const struct iovec *iov, uint32_t count,
                 uint32_t bytes);
    /* Called before each wait: how long that may take, in milliseconds, or -1. */
    int (*prepare)(struct net_engine *engine);
    /* `fd` has epoll events. */
    void (*ready)(struct net_engine *engine, int fd, uint32_t events);
    /* Called after each wait: does what can be done without waiting. */
    void (*serve)(struct net_engine *engine);
};

/* What a frame may be, other than complete and no longer than the MTU; the values of TUN_F_...
 * in linux/if_tun.h. All but the first need the first. */
enum net_offload {
    NET_OFFLOAD_CSUM = 0x01, /* its checksum may be missing, as virtio_net_hdr says */
    NET_OFFLOAD_TSO4 = 0x02, /* it may be a TCP segment of up to 64 KiB on IPv4 */
    NET_OFFLOAD_TSO6 = 0x04, /* on IPv6 */
    NET_OFFLOAD_ECN = 0x08,  /* TSO with the CWR flag set */
    NET_OFFLOAD_UFO = 0x10,  /* it may be a UDP datagram of up to 64 KiB */
    NET_OFFLOAD_USO4 = 0x20, /* many UDP datagrams of one size in one, on IPv4 */
    NET_OFFLOAD_USO6 = 0x40, /* on IPv6 */
};

#endif
