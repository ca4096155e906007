/* An Ethernet switch for virtual machines: a Unix socket that each of them connects to.
 *
 * A port is a SOCK_SEQPACKET connection; a message is a struct virtio_net_hdr_v1 and a frame. A
 * message of 4 bytes says which offloads (enum net_offload, little-endian) its sender takes from
 * now on, at first none; frames that need others are completed for it here.
 *
 * The switch learns where a MAC address is from what comes from there, and sends what goes to an
 * unknown one everywhere. Each port has a bounded queue: one that takes its frames too slowly loses
 * frames of its own, and nobody else's. */
#ifndef PYVMM_NET_SWITCH_H
#define PYVMM_NET_SWITCH_H

#include <stdbool.h>
#include <stdint.h>

#include "net_port.h"

/* What ports may send. */
#define NET_SWITCH_OFFLOADS \
    (NET_OFFLOAD_CSUM | NET_OFFLOAD_TSO4 | NET_OFFLOAD_TSO6 | NET_OFFLOAD_ECN)

enum net_switch_result { NET_SWITCH_STOPPED, NET_SWITCH_EMPTY };

struct net_switch_counters {
    uint64_t ports; /* now */
    uint64_t frames;
    uint64_t malformed; /* dropped */
    uint64_t dropped;   /* for want of room in the queue of a port; one for each port */
};

struct net_switch;

/* `listen_fd` is a non-blocking SOCK_SEQPACKET socket that listens, and stays the caller's. NULL
 * with errno set on failure. */
struct net_switch *net_switch_create(int listen_fd);
void net_switch_destroy(struct net_switch *hub);

/* Adds a port, whose socket then belongs to the switch. While it does not run. 0 or -errno. */
int net_switch_add(struct net_switch *hub, int fd);

/* Serves the ports until net_switch_stop or, with `until_empty`, until the last one has left. An
 * enum net_switch_result or -errno. */
int net_switch_run(struct net_switch *hub, bool until_empty);
void net_switch_stop(struct net_switch *hub);

struct net_switch_counters net_switch_counters(const struct net_switch *hub);

#endif
