"""Constants and structures of asm/bootparam.h.

Written by scripts/generate-bindings; do not edit.
"""

from ctypes import Structure, c_uint16, c_uint32, c_uint64, c_uint8

# setup_header.loadflags
LOADED_HIGH = 0x1
QUIET_FLAG = 0x20
KEEP_SEGMENTS = 0x40
CAN_USE_HEAP = 0x80

# setup_header.xloadflags
XLF_KERNEL_64 = 0x1
XLF_CAN_BE_LOADED_ABOVE_4G = 0x2
XLF_5LEVEL = 0x20
XLF_5LEVEL_ENABLED = 0x40

# setup_data.type
SETUP_NONE = 0
SETUP_E820_EXT = 1
SETUP_RNG_SEED = 9

# Entries of boot_params.e820_table
E820_MAX_ENTRIES_ZEROPAGE = 128


class setup_header(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("setup_sects", c_uint8), ("root_flags", c_uint16), ("syssize", c_uint32),
        ("ram_size", c_uint16), ("vid_mode", c_uint16), ("root_dev", c_uint16),
        ("boot_flag", c_uint16), ("jump", c_uint16), ("header", c_uint32), ("version", c_uint16),
        ("realmode_swtch", c_uint32), ("start_sys_seg", c_uint16), ("kernel_version", c_uint16),
        ("type_of_loader", c_uint8), ("loadflags", c_uint8), ("setup_move_size", c_uint16),
        ("code32_start", c_uint32), ("ramdisk_image", c_uint32), ("ramdisk_size", c_uint32),
        ("bootsect_kludge", c_uint32), ("heap_end_ptr", c_uint16), ("ext_loader_ver", c_uint8),
        ("ext_loader_type", c_uint8), ("cmd_line_ptr", c_uint32), ("initrd_addr_max", c_uint32),
        ("kernel_alignment", c_uint32), ("relocatable_kernel", c_uint8), ("min_alignment", c_uint8),
        ("xloadflags", c_uint16), ("cmdline_size", c_uint32), ("hardware_subarch", c_uint32),
        ("hardware_subarch_data", c_uint64), ("payload_offset", c_uint32),
        ("payload_length", c_uint32), ("setup_data", c_uint64), ("pref_address", c_uint64),
        ("init_size", c_uint32), ("handover_offset", c_uint32), ("kernel_info_offset", c_uint32),
    ]


class setup_data(Structure):
    _fields_ = [
        ("next", c_uint64), ("type", c_uint32), ("len", c_uint32), ("data", c_uint8 * 0),
    ]


class boot_e820_entry(Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [
        ("addr", c_uint64), ("size", c_uint64), ("type", c_uint32),
    ]


class boot_params(Structure):
    _fields_ = [
        ("_gap0", c_uint8 * 112), ("acpi_rsdp_addr", c_uint64), ("_gap78", c_uint8 * 72),
        ("ext_ramdisk_image", c_uint32), ("ext_ramdisk_size", c_uint32),
        ("ext_cmd_line_ptr", c_uint32), ("_gapcc", c_uint8 * 284), ("e820_entries", c_uint8),
        ("_gap1e9", c_uint8 * 6), ("sentinel", c_uint8), ("_gap1f0", c_uint8 * 1),
        ("hdr", setup_header), ("_gap26c", c_uint8 * 100), ("e820_table", boot_e820_entry * 128),
        ("_gapcd0", c_uint8 * 816),
    ]
