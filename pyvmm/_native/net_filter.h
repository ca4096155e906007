/* Which frames a network device passes to its driver (virtio 1.2, sections 5.1.6.5.1 to 5.1.6.5.3).
 *
 * One thread changes a filter while others ask it. Each field is atomic, and all of them together
 * need not be: a frame that comes while the driver changes its filter meets the old, the new, or
 * some of each. */
#ifndef PYVMM_NET_FILTER_H
#define PYVMM_NET_FILTER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NET_FILTER_MACS 64u
#define NET_FILTER_VLANS 4096u

/* How much of a frame net_filter_accepts looks at. */
#define NET_FILTER_LOOK 18u

enum net_filter_mode {
    NET_FILTER_PROMISC = 1 << 0, /* everything, whatever the rest says */
    NET_FILTER_ALLMULTI = 1 << 1,
    NET_FILTER_ALLUNI = 1 << 2,
    NET_FILTER_NOMULTI = 1 << 3,
    NET_FILTER_NOUNI = 1 << 4,
    NET_FILTER_NOBCAST = 1 << 5,
};

/* More addresses than fit are as good as all. */
struct net_filter_table {
    uint32_t count;
    uint64_t macs[NET_FILTER_MACS];
};

struct net_filter {
    uint32_t mode; /* NET_FILTER_... bits */
    uint64_t mac;  /* the device's own */
    struct net_filter_table unicast, multicast;
    bool filter_vlans; /* of the frames with a VLAN tag, only those of `vlans` */
    uint32_t vlans[NET_FILTER_VLANS / 32];
};

/* Lets everything pass; no other thread may use the filter. */
void net_filter_init(struct net_filter *filter, const uint8_t mac[6], bool filter_vlans);

void net_filter_set_mode(struct net_filter *filter, uint32_t mode);
void net_filter_set_mac(struct net_filter *filter, const uint8_t mac[6]);
void net_filter_set_vlan(struct net_filter *filter, uint32_t id, bool on);

/* `macs` are `count` addresses of 6 bytes. */
void net_filter_set_table(struct net_filter_table *table, const uint8_t *macs, uint32_t count);

/* Whether a frame passes that begins with the `size` bytes at `frame`, at least 14 and, where the
 * frame has as many, NET_FILTER_LOOK. */
bool net_filter_accepts(const struct net_filter *filter, const uint8_t *frame, size_t size);

#endif
