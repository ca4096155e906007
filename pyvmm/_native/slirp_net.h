/* User-mode networking: libslirp, a TCP/IP stack inside this process, takes the Ethernet frames of
 * one guest and speaks for it through ordinary sockets of the host. No root, no device.
 *
 * The stack is an engine (net_port.h): it runs on the thread of the guest's queues, which it takes
 * frames from and gives frames to without anybody in between.
 *
 * While frames wait for the guest the stack stands still: it takes no frame, reads no socket and
 * runs no timer. So memory is bounded, TCP's own flow control reaches the peers, and a guest that
 * is paused loses no connection. */
#ifndef PYVMM_SLIRP_NET_H
#define PYVMM_SLIRP_NET_H

#include <stdbool.h>
#include <stdint.h>

#include "net_port.h"

/* What libslirp can do; its interface has limits of its own beside those of IP. */
#define SLIRP_NET_MTU_MIN 576
#define SLIRP_NET_MTU_MAX 65520

/* IPv4 addresses are in host byte order. IPv6, where it is on, is fec0::/64 with the host at
 * fec0::2 and the name server at fec0::3. */
struct slirp_net_config {
    uint32_t network;
    uint32_t netmask;
    uint32_t host;        /* stands for the host: router, DHCP server, and the host's loopback */
    uint32_t name_server; /* asks the host's */
    uint32_t guest;       /* what DHCP gives */
    uint16_t mtu;
    bool ipv6;
    bool restricted;    /* nothing leaves the network, but for the forwarded ports */
    bool host_loopback; /* `host` reaches services that listen on the host's loopback alone */
    const char *hostname; /* given by DHCP; or NULL */
};

struct slirp_net_counters {
    uint64_t from_guest; /* frames */
    uint64_t to_guest;
    uint64_t malformed; /* from the guest, dropped: neither ARP nor IP */
    uint64_t dropped;   /* to the guest: more than the bounded queue holds */
};

struct slirp_net;

/* `config` is copied. NULL with errno set on failure. Neither is to be called by two threads at once,
 * nor destroy while the engine is attached. */
struct slirp_net *slirp_net_create(const struct slirp_net_config *config);
void slirp_net_destroy(struct slirp_net *net);

/* Connections to (datagrams for) a port of the host go to one of the guest, `guest` 0 meaning the
 * address that DHCP gives. Port 0 of the host lets the kernel choose. Returns the port, or -errno.
 * Not while the engine is attached. */
int slirp_net_forward(struct slirp_net *net, bool udp, uint32_t host, uint16_t host_port,
                      uint32_t guest, uint16_t guest_port);

struct net_engine *slirp_net_engine(struct slirp_net *net);

/* Any thread. */
struct slirp_net_counters slirp_net_counters(const struct slirp_net *net);

#endif
