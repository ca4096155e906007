"""Constants and structures of linux/virtio_ids.h, linux/virtio_config.h, linux/virtio_ring.h,
linux/virtio_mmio.h, linux/virtio_blk.h, linux/virtio_net.h, linux/virtio_scsi.h,
linux/virtio_console.h, linux/virtio_balloon.h, linux/virtio_input.h.

Written by scripts/generate-bindings; do not edit.
"""

from ctypes import Structure, Union, c_uint16, c_uint32, c_uint64, c_uint8

# Device IDs
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
VIRTIO_ID_CONSOLE = 3
VIRTIO_ID_RNG = 4
VIRTIO_ID_BALLOON = 5
VIRTIO_ID_SCSI = 8
VIRTIO_ID_9P = 9
VIRTIO_ID_INPUT = 18
VIRTIO_ID_FS = 26

# Device status
VIRTIO_CONFIG_S_ACKNOWLEDGE = 0x1
VIRTIO_CONFIG_S_DRIVER = 0x2
VIRTIO_CONFIG_S_DRIVER_OK = 0x4
VIRTIO_CONFIG_S_FEATURES_OK = 0x8
VIRTIO_CONFIG_S_NEEDS_RESET = 0x40
VIRTIO_CONFIG_S_FAILED = 0x80

# Feature bits of every device
VIRTIO_F_NOTIFY_ON_EMPTY = 24
VIRTIO_F_ANY_LAYOUT = 27
VIRTIO_RING_F_INDIRECT_DESC = 28
VIRTIO_RING_F_EVENT_IDX = 29
VIRTIO_F_VERSION_1 = 32
VIRTIO_F_ACCESS_PLATFORM = 33
VIRTIO_F_RING_PACKED = 34
VIRTIO_F_IN_ORDER = 35
VIRTIO_F_ORDER_PLATFORM = 36
VIRTIO_F_SR_IOV = 37
VIRTIO_F_RING_RESET = 40

# Split virtqueue
VRING_DESC_F_NEXT = 1
VRING_DESC_F_WRITE = 2
VRING_DESC_F_INDIRECT = 4
VRING_USED_F_NO_NOTIFY = 1
VRING_AVAIL_F_NO_INTERRUPT = 1
VRING_AVAIL_ALIGN_SIZE = 2
VRING_USED_ALIGN_SIZE = 4
VRING_DESC_ALIGN_SIZE = 16

# Registers of the MMIO transport
VIRTIO_MMIO_MAGIC_VALUE = 0x0
VIRTIO_MMIO_VERSION = 0x4
VIRTIO_MMIO_DEVICE_ID = 0x8
VIRTIO_MMIO_VENDOR_ID = 0xc
VIRTIO_MMIO_DEVICE_FEATURES = 0x10
VIRTIO_MMIO_DEVICE_FEATURES_SEL = 0x14
VIRTIO_MMIO_DRIVER_FEATURES = 0x20
VIRTIO_MMIO_DRIVER_FEATURES_SEL = 0x24
VIRTIO_MMIO_QUEUE_SEL = 0x30
VIRTIO_MMIO_QUEUE_NUM_MAX = 0x34
VIRTIO_MMIO_QUEUE_NUM = 0x38
VIRTIO_MMIO_QUEUE_READY = 0x44
VIRTIO_MMIO_QUEUE_NOTIFY = 0x50
VIRTIO_MMIO_INTERRUPT_STATUS = 0x60
VIRTIO_MMIO_INTERRUPT_ACK = 0x64
VIRTIO_MMIO_STATUS = 0x70
VIRTIO_MMIO_QUEUE_DESC_LOW = 0x80
VIRTIO_MMIO_QUEUE_DESC_HIGH = 0x84
VIRTIO_MMIO_QUEUE_AVAIL_LOW = 0x90
VIRTIO_MMIO_QUEUE_AVAIL_HIGH = 0x94
VIRTIO_MMIO_QUEUE_USED_LOW = 0xa0
VIRTIO_MMIO_QUEUE_USED_HIGH = 0xa4
VIRTIO_MMIO_SHM_SEL = 0xac
VIRTIO_MMIO_SHM_LEN_LOW = 0xb0
VIRTIO_MMIO_SHM_LEN_HIGH = 0xb4
VIRTIO_MMIO_SHM_BASE_LOW = 0xb8
VIRTIO_MMIO_SHM_BASE_HIGH = 0xbc
VIRTIO_MMIO_CONFIG_GENERATION = 0xfc
VIRTIO_MMIO_CONFIG = 0x100

# InterruptStatus bits
VIRTIO_MMIO_INT_VRING = 1
VIRTIO_MMIO_INT_CONFIG = 2

# Block device
VIRTIO_BLK_F_SIZE_MAX = 1
VIRTIO_BLK_F_SEG_MAX = 2
VIRTIO_BLK_F_GEOMETRY = 4
VIRTIO_BLK_F_RO = 5
VIRTIO_BLK_F_BLK_SIZE = 6
VIRTIO_BLK_F_FLUSH = 9
VIRTIO_BLK_F_TOPOLOGY = 10
VIRTIO_BLK_F_CONFIG_WCE = 11
VIRTIO_BLK_F_MQ = 12
VIRTIO_BLK_F_DISCARD = 13
VIRTIO_BLK_F_WRITE_ZEROES = 14
VIRTIO_BLK_F_SECURE_ERASE = 16
VIRTIO_BLK_T_IN = 0
VIRTIO_BLK_T_OUT = 1
VIRTIO_BLK_T_FLUSH = 4
VIRTIO_BLK_T_GET_ID = 8
VIRTIO_BLK_T_DISCARD = 11
VIRTIO_BLK_T_WRITE_ZEROES = 13
VIRTIO_BLK_T_SECURE_ERASE = 14
VIRTIO_BLK_S_OK = 0
VIRTIO_BLK_S_IOERR = 1
VIRTIO_BLK_S_UNSUPP = 2
VIRTIO_BLK_ID_BYTES = 20
VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP = 1

# Network device
VIRTIO_NET_F_CSUM = 0
VIRTIO_NET_F_GUEST_CSUM = 1
VIRTIO_NET_F_CTRL_GUEST_OFFLOADS = 2
VIRTIO_NET_F_MTU = 3
VIRTIO_NET_F_MAC = 5
VIRTIO_NET_F_GUEST_TSO4 = 7
VIRTIO_NET_F_GUEST_TSO6 = 8
VIRTIO_NET_F_GUEST_ECN = 9
VIRTIO_NET_F_GUEST_UFO = 10
VIRTIO_NET_F_HOST_TSO4 = 11
VIRTIO_NET_F_HOST_TSO6 = 12
VIRTIO_NET_F_HOST_ECN = 13
VIRTIO_NET_F_HOST_UFO = 14
VIRTIO_NET_F_MRG_RXBUF = 15
VIRTIO_NET_F_STATUS = 16
VIRTIO_NET_F_CTRL_VQ = 17
VIRTIO_NET_F_CTRL_RX = 18
VIRTIO_NET_F_CTRL_VLAN = 19
VIRTIO_NET_F_CTRL_RX_EXTRA = 20
VIRTIO_NET_F_GUEST_ANNOUNCE = 21
VIRTIO_NET_F_MQ = 22
VIRTIO_NET_F_CTRL_MAC_ADDR = 23
VIRTIO_NET_F_SPEED_DUPLEX = 63
VIRTIO_NET_S_LINK_UP = 1
VIRTIO_NET_S_ANNOUNCE = 2
VIRTIO_NET_HDR_F_NEEDS_CSUM = 1
VIRTIO_NET_HDR_F_DATA_VALID = 2
VIRTIO_NET_HDR_GSO_NONE = 0
VIRTIO_NET_HDR_GSO_TCPV4 = 1
VIRTIO_NET_HDR_GSO_UDP = 3
VIRTIO_NET_HDR_GSO_TCPV6 = 4
VIRTIO_NET_HDR_GSO_ECN = 128
VIRTIO_NET_OK = 0
VIRTIO_NET_ERR = 1
VIRTIO_NET_CTRL_RX = 0
VIRTIO_NET_CTRL_RX_PROMISC = 0
VIRTIO_NET_CTRL_RX_ALLMULTI = 1
VIRTIO_NET_CTRL_RX_ALLUNI = 2
VIRTIO_NET_CTRL_RX_NOMULTI = 3
VIRTIO_NET_CTRL_RX_NOUNI = 4
VIRTIO_NET_CTRL_RX_NOBCAST = 5
VIRTIO_NET_CTRL_MAC = 1
VIRTIO_NET_CTRL_MAC_TABLE_SET = 0
VIRTIO_NET_CTRL_MAC_ADDR_SET = 1
VIRTIO_NET_CTRL_VLAN = 2
VIRTIO_NET_CTRL_VLAN_ADD = 0
VIRTIO_NET_CTRL_VLAN_DEL = 1
VIRTIO_NET_CTRL_ANNOUNCE = 3
VIRTIO_NET_CTRL_ANNOUNCE_ACK = 0
VIRTIO_NET_CTRL_MQ = 4
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET = 0
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MIN = 1
VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX = 32768
VIRTIO_NET_CTRL_GUEST_OFFLOADS = 5
VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET = 0

# SCSI host
VIRTIO_SCSI_F_INOUT = 0
VIRTIO_SCSI_F_HOTPLUG = 1
VIRTIO_SCSI_F_CHANGE = 2
VIRTIO_SCSI_F_T10_PI = 3
VIRTIO_SCSI_CDB_DEFAULT_SIZE = 32
VIRTIO_SCSI_SENSE_DEFAULT_SIZE = 96
VIRTIO_SCSI_S_OK = 0
VIRTIO_SCSI_S_OVERRUN = 1
VIRTIO_SCSI_S_ABORTED = 2
VIRTIO_SCSI_S_BAD_TARGET = 3
VIRTIO_SCSI_S_RESET = 4
VIRTIO_SCSI_S_BUSY = 5
VIRTIO_SCSI_S_TRANSPORT_FAILURE = 6
VIRTIO_SCSI_S_TARGET_FAILURE = 7
VIRTIO_SCSI_S_NEXUS_FAILURE = 8
VIRTIO_SCSI_S_FAILURE = 9
VIRTIO_SCSI_S_FUNCTION_SUCCEEDED = 10
VIRTIO_SCSI_S_FUNCTION_REJECTED = 11
VIRTIO_SCSI_S_INCORRECT_LUN = 12
VIRTIO_SCSI_T_TMF = 0
VIRTIO_SCSI_T_AN_QUERY = 1
VIRTIO_SCSI_T_AN_SUBSCRIBE = 2
VIRTIO_SCSI_T_TMF_ABORT_TASK = 0
VIRTIO_SCSI_T_TMF_ABORT_TASK_SET = 1
VIRTIO_SCSI_T_TMF_CLEAR_ACA = 2
VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET = 3
VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET = 4
VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET = 5
VIRTIO_SCSI_T_TMF_QUERY_TASK = 6
VIRTIO_SCSI_T_TMF_QUERY_TASK_SET = 7
VIRTIO_SCSI_T_NO_EVENT = 0
VIRTIO_SCSI_T_TRANSPORT_RESET = 1
VIRTIO_SCSI_T_ASYNC_NOTIFY = 2
VIRTIO_SCSI_T_PARAM_CHANGE = 3
VIRTIO_SCSI_EVT_RESET_HARD = 0
VIRTIO_SCSI_EVT_RESET_RESCAN = 1
VIRTIO_SCSI_EVT_RESET_REMOVED = 2
VIRTIO_SCSI_S_SIMPLE = 0
VIRTIO_SCSI_S_ORDERED = 1
VIRTIO_SCSI_S_HEAD = 2
VIRTIO_SCSI_S_ACA = 3

# SCSI host: a flag
VIRTIO_SCSI_T_EVENTS_MISSED = 0x80000000

# Console
VIRTIO_CONSOLE_F_SIZE = 0
VIRTIO_CONSOLE_F_MULTIPORT = 1
VIRTIO_CONSOLE_F_EMERG_WRITE = 2
VIRTIO_CONSOLE_DEVICE_READY = 0
VIRTIO_CONSOLE_PORT_ADD = 1
VIRTIO_CONSOLE_PORT_REMOVE = 2
VIRTIO_CONSOLE_PORT_READY = 3
VIRTIO_CONSOLE_CONSOLE_PORT = 4
VIRTIO_CONSOLE_RESIZE = 5
VIRTIO_CONSOLE_PORT_OPEN = 6
VIRTIO_CONSOLE_PORT_NAME = 7

# Console: no port
VIRTIO_CONSOLE_BAD_ID = 0xffffffff

# Memory balloon
VIRTIO_BALLOON_F_MUST_TELL_HOST = 0
VIRTIO_BALLOON_F_STATS_VQ = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
VIRTIO_BALLOON_F_FREE_PAGE_HINT = 3
VIRTIO_BALLOON_F_PAGE_POISON = 4
VIRTIO_BALLOON_F_REPORTING = 5
VIRTIO_BALLOON_PFN_SHIFT = 12
VIRTIO_BALLOON_CMD_ID_STOP = 0
VIRTIO_BALLOON_CMD_ID_DONE = 1
VIRTIO_BALLOON_S_SWAP_IN = 0
VIRTIO_BALLOON_S_SWAP_OUT = 1
VIRTIO_BALLOON_S_MAJFLT = 2
VIRTIO_BALLOON_S_MINFLT = 3
VIRTIO_BALLOON_S_MEMFREE = 4
VIRTIO_BALLOON_S_MEMTOT = 5
VIRTIO_BALLOON_S_AVAIL = 6
VIRTIO_BALLOON_S_CACHES = 7
VIRTIO_BALLOON_S_HTLB_PGALLOC = 8
VIRTIO_BALLOON_S_HTLB_PGFAIL = 9

# Input device (select of its config space)
VIRTIO_INPUT_CFG_UNSET = 0x0
VIRTIO_INPUT_CFG_ID_NAME = 0x1
VIRTIO_INPUT_CFG_ID_SERIAL = 0x2
VIRTIO_INPUT_CFG_ID_DEVIDS = 0x3
VIRTIO_INPUT_CFG_PROP_BITS = 0x10
VIRTIO_INPUT_CFG_EV_BITS = 0x11
VIRTIO_INPUT_CFG_ABS_INFO = 0x12


class vring_desc(Structure):
    _fields_ = [
        ("addr", c_uint64), ("len", c_uint32), ("flags", c_uint16), ("next", c_uint16),
    ]


class vring_used_elem(Structure):
    _fields_ = [
        ("id", c_uint32), ("len", c_uint32),
    ]


class virtio_blk_geometry(Structure):
    _fields_ = [
        ("cylinders", c_uint16), ("heads", c_uint8), ("sectors", c_uint8),
    ]


class virtio_blk_config(Structure):
    _fields_ = [
        ("capacity", c_uint64), ("size_max", c_uint32), ("seg_max", c_uint32),
        ("geometry", virtio_blk_geometry), ("blk_size", c_uint32), ("physical_block_exp", c_uint8),
        ("alignment_offset", c_uint8), ("min_io_size", c_uint16), ("opt_io_size", c_uint32),
        ("wce", c_uint8), ("unused", c_uint8), ("num_queues", c_uint16),
        ("max_discard_sectors", c_uint32), ("max_discard_seg", c_uint32),
        ("discard_sector_alignment", c_uint32), ("max_write_zeroes_sectors", c_uint32),
        ("max_write_zeroes_seg", c_uint32), ("write_zeroes_may_unmap", c_uint8),
        ("unused1", c_uint8 * 3), ("max_secure_erase_sectors", c_uint32),
        ("max_secure_erase_seg", c_uint32), ("secure_erase_sector_alignment", c_uint32),
    ]


class virtio_blk_outhdr(Structure):
    _fields_ = [
        ("type", c_uint32), ("ioprio", c_uint32), ("sector", c_uint64),
    ]


class virtio_blk_discard_write_zeroes(Structure):
    _fields_ = [
        ("sector", c_uint64), ("num_sectors", c_uint32), ("flags", c_uint32),
    ]


class virtio_net_config(Structure):
    _fields_ = [
        ("mac", c_uint8 * 6), ("status", c_uint16), ("max_virtqueue_pairs", c_uint16),
        ("mtu", c_uint16), ("speed", c_uint32), ("duplex", c_uint8), ("rss_max_key_size", c_uint8),
        ("rss_max_indirection_table_length", c_uint16), ("supported_hash_types", c_uint32),
    ]


class virtio_net_hdr_v1(Structure):
    _fields_ = [
        ("flags", c_uint8), ("gso_type", c_uint8), ("hdr_len", c_uint16), ("gso_size", c_uint16),
        ("csum_start", c_uint16), ("csum_offset", c_uint16), ("num_buffers", c_uint16),
    ]


class virtio_net_ctrl_hdr(Structure):
    _fields_ = [
        ("class_", c_uint8), ("cmd", c_uint8),
    ]


class virtio_net_ctrl_mq(Structure):
    _fields_ = [
        ("virtqueue_pairs", c_uint16),
    ]


class virtio_scsi_config(Structure):
    _fields_ = [
        ("num_queues", c_uint32), ("seg_max", c_uint32), ("max_sectors", c_uint32),
        ("cmd_per_lun", c_uint32), ("event_info_size", c_uint32), ("sense_size", c_uint32),
        ("cdb_size", c_uint32), ("max_channel", c_uint16), ("max_target", c_uint16),
        ("max_lun", c_uint32),
    ]


class virtio_scsi_cmd_req(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("lun", c_uint8 * 8), ("tag", c_uint64), ("task_attr", c_uint8), ("prio", c_uint8),
        ("crn", c_uint8), ("cdb", c_uint8 * 32),
    ]


class virtio_scsi_cmd_resp(Structure):
    _fields_ = [
        ("sense_len", c_uint32), ("resid", c_uint32), ("status_qualifier", c_uint16),
        ("status", c_uint8), ("response", c_uint8), ("sense", c_uint8 * 96),
    ]


class virtio_scsi_ctrl_tmf_req(Structure):
    _fields_ = [
        ("type", c_uint32), ("subtype", c_uint32), ("lun", c_uint8 * 8), ("tag", c_uint64),
    ]


class virtio_scsi_ctrl_tmf_resp(Structure):
    _fields_ = [
        ("response", c_uint8),
    ]


class virtio_scsi_ctrl_an_req(Structure):
    _fields_ = [
        ("type", c_uint32), ("lun", c_uint8 * 8), ("event_requested", c_uint32),
    ]


class virtio_scsi_ctrl_an_resp(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("event_actual", c_uint32), ("response", c_uint8),
    ]


class virtio_scsi_event(Structure):
    _fields_ = [
        ("event", c_uint32), ("lun", c_uint8 * 8), ("reason", c_uint32),
    ]


class virtio_console_config(Structure):
    _fields_ = [
        ("cols", c_uint16), ("rows", c_uint16), ("max_nr_ports", c_uint32), ("emerg_wr", c_uint32),
    ]


class virtio_console_control(Structure):
    _fields_ = [
        ("id", c_uint32), ("event", c_uint16), ("value", c_uint16),
    ]


class _virtio_balloon_config_u0(Union):
    _fields_ = [
        ("free_page_hint_cmd_id", c_uint32), ("free_page_report_cmd_id", c_uint32),
    ]


class virtio_balloon_config(Structure):
    _anonymous_ = ("_u0",)
    _fields_ = [
        ("num_pages", c_uint32), ("actual", c_uint32), ("_u0", _virtio_balloon_config_u0),
        ("poison_val", c_uint32),
    ]


class virtio_balloon_stat(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("tag", c_uint16), ("val", c_uint64),
    ]


class virtio_input_absinfo(Structure):
    _fields_ = [
        ("min", c_uint32), ("max", c_uint32), ("fuzz", c_uint32), ("flat", c_uint32),
        ("res", c_uint32),
    ]


class virtio_input_devids(Structure):
    _fields_ = [
        ("bustype", c_uint16), ("vendor", c_uint16), ("product", c_uint16), ("version", c_uint16),
    ]


class _virtio_input_config_u(Union):
    _fields_ = [
        ("string", c_uint8 * 128), ("bitmap", c_uint8 * 128), ("abs", virtio_input_absinfo),
        ("ids", virtio_input_devids),
    ]


class virtio_input_config(Structure):
    _fields_ = [
        ("select", c_uint8), ("subsel", c_uint8), ("size", c_uint8), ("reserved", c_uint8 * 5),
        ("u", _virtio_input_config_u),
    ]


class virtio_input_event(Structure):
    _fields_ = [
        ("type", c_uint16), ("code", c_uint16), ("value", c_uint32),
    ]
