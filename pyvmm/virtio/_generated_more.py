"""More structures of linux/virtio_ids.h, linux/virtio_config.h, linux/virtio_ring.h,
linux/virtio_mmio.h, linux/virtio_blk.h, linux/virtio_net.h, linux/virtio_scsi.h,
linux/virtio_console.h, linux/virtio_balloon.h, linux/virtio_input.h.

Written by scripts/generate-bindings; do not edit.
"""

from ctypes import Structure, Union, c_uint16, c_uint32, c_uint64, c_uint8


class vring_desc(Structure):
    _fields_ = [
        ("addr", c_uint64), ("len", c_uint32), ("flags", c_uint16), ("next", c_uint16),
    ]


class vring_used_elem(Structure):
    _fields_ = [
        ("id", c_uint32), ("len", c_uint32),
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
