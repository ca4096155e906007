#include "net_filter.h"

#include <string.h>

#define load(field) __atomic_load_n(&(field), __ATOMIC_RELAXED)
#define store(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELAXED)

#define BROADCAST 0xFFFFFFFFFFFFull
#define GROUP_BIT 1u /* of the first byte of an address */
#define VLAN_ID 0x0FFFu

static uint64_t mac_at(const uint8_t *bytes)
{
    uint64_t mac = 0;

    memcpy(&mac, bytes, 6);
    return mac;
}

void net_filter_init(struct net_filter *filter, const uint8_t mac[6], bool filter_vlans)
{
    *filter = (struct net_filter){
        .mode = NET_FILTER_PROMISC, .mac = mac_at(mac), .filter_vlans = filter_vlans};
}

void net_filter_set_mode(struct net_filter *filter, uint32_t mode)
{
    store(filter->mode, mode);
}

void net_filter_set_mac(struct net_filter *filter, const uint8_t mac[6])
{
    store(filter->mac, mac_at(mac));
}

void net_filter_set_vlan(struct net_filter *filter, uint32_t id, bool on)
{
    uint32_t *word = &filter->vlans[id % NET_FILTER_VLANS / 32];
    uint32_t bit = 1u << id % 32;

    if (on)
        __atomic_fetch_or(word, bit, __ATOMIC_RELAXED);
    else
        __atomic_fetch_and(word, ~bit, __ATOMIC_RELAXED);
}

void net_filter_set_table(struct net_filter_table *table, const uint8_t *macs, uint32_t count)
{
    for (uint32_t i = 0; i < count && i < NET_FILTER_MACS; i++)
        store(table->macs[i], mac_at(macs + 6 * (size_t)i));
    store(table->count, count);
}

static bool table_has(const struct net_filter_table *table, uint64_t mac)
{
    uint32_t count = load(table->count);

    if (count > NET_FILTER_MACS)
        return true;
    for (uint32_t i = 0; i < count; i++) {
        if (load(table->macs[i]) == mac)
            return true;
    }
    return false;
}

/* Frames without a tag, and those whose tag has a priority alone, are of no VLAN. */
static bool vlan_passes(const struct net_filter *filter, const uint8_t *frame, size_t size)
{
    uint32_t id;

    if (!filter->filter_vlans || size < NET_FILTER_LOOK || frame[12] != 0x81 || frame[13] != 0x00)
        return true;
    id = ((uint32_t)frame[14] << 8 | frame[15]) & VLAN_ID;
    return id == 0 || (load(filter->vlans[id / 32]) & 1u << id % 32);
}

bool net_filter_accepts(const struct net_filter *filter, const uint8_t *frame, size_t size)
{
    uint32_t mode = load(filter->mode);
    uint64_t to = mac_at(frame);

    if (mode & NET_FILTER_PROMISC)
        return true;
    if (!vlan_passes(filter, frame, size))
        return false;
    if (to == BROADCAST)
        return !(mode & NET_FILTER_NOBCAST);
    if (frame[0] & GROUP_BIT) {
        if (mode & NET_FILTER_NOMULTI)
            return false;
        return (mode & NET_FILTER_ALLMULTI) || table_has(&filter->multicast, to);
    }
    if (mode & NET_FILTER_NOUNI)
        return false;
    return (mode & NET_FILTER_ALLUNI) || to == load(filter->mac) ||
           table_has(&filter->unicast, to);
}
