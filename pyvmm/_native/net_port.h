/* A port carries Ethernet frames: how they stand on its file descriptor, and what they may be. */
#ifndef PYVMM_NET_PORT_H
#define PYVMM_NET_PORT_H

enum net_framing {
    NET_FRAMING_TAP,    /* read and write, one frame each */
    NET_FRAMING_PACKET, /* a message of a datagram or seqpacket socket; an empty one ends it */
    NET_FRAMING_STREAM, /* of a stream socket: the length in 4 bytes, big-endian, then the frame */
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
