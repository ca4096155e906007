/* The work that a sender left to its network card: checksums, and the cutting of large TCP segments.
 * Done here for a receiver that cannot take such frames. */
#ifndef PYVMM_NET_GSO_H
#define PYVMM_NET_GSO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The longest message: a virtio_net_hdr_v1, an Ethernet header with a VLAN tag, an IP packet. */
#define NET_MESSAGE_MAX (12 + 18 + 65535)

/* A message is a struct virtio_net_hdr_v1 (virtio 1.2, 5.1.6) and the frame that it describes. */

/* Whether one who takes `offloads` (enum net_offload) can take the message as it is. The message is
 * at least as long as its header. */
bool net_gso_takes(uint32_t offloads, const uint8_t *message);

/* Emits, in order, complete frames that say together what the message says, each behind a header
 * without any flag. False if the message contradicts itself or is of a kind that is not offered
 * (UDP segments): then nothing was emitted. `emit` gets memory that is valid while it runs. */
typedef void (*net_gso_emit)(void *opaque, const uint8_t *message, size_t size);
bool net_gso_complete(const uint8_t *message, size_t size, net_gso_emit emit, void *opaque);

#endif
