/* How it works: the calls find their struct memory_vfs through the vfs, its first member; the one
 * struct vfs_file is part of it, so that opening takes no memory and closing frees none. */
#include "tests/support/memory_vfs.h"

#include <string.h>

#include "tests/support/fuzz_support.h"

static int memory_open(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out)
{
    struct memory_vfs *memory = (struct memory_vfs *)vfs;

    (void)path;
    (void)flags;
    memory->file = (struct vfs_file){vfs, -1};
    *out = &memory->file;
    return 0;
}

static int memory_close(struct vfs_file *file)
{
    (void)file;
    return 0;
}

static int memory_pread(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                        size_t *got)
{
    const struct memory_vfs *memory = (const struct memory_vfs *)file->vfs;

    *got = 0;
    if (offset >= memory->bytes)
        return 0;
    *got = memory->bytes - offset < bytes ? memory->bytes - offset : bytes;
    memcpy(buffer, memory->data + offset, *got);
    return 0;
}

static int memory_pwrite(struct vfs_file *file, const void *buffer, size_t bytes, uint64_t offset,
                         size_t *put)
{
    struct memory_vfs *memory = (struct memory_vfs *)file->vfs;

    require(bytes <= memory->room_bytes && offset <= memory->room_bytes - bytes,
            "a write beyond the room there is");
    memcpy(memory->room + offset, buffer, bytes);
    if (memory->bytes < offset + bytes)
        memory->bytes = offset + bytes;
    *put = bytes;
    return 0;
}

static int memory_size(struct vfs_file *file, uint64_t *bytes)
{
    *bytes = ((const struct memory_vfs *)file->vfs)->bytes;
    return 0;
}

static int memory_stat(struct vfs *vfs, const char *path, struct vfs_stat *out)
{
    (void)path;
    *out = (struct vfs_stat){.kind = VFS_FILE, .bytes = ((const struct memory_vfs *)vfs)->bytes};
    return 0;
}

static int memory_sync(struct vfs_file *file, bool data_only)
{
    (void)file;
    (void)data_only;
    return 0;
}

static int memory_rename(struct vfs *vfs, const char *from, const char *to)
{
    (void)vfs;
    (void)from;
    (void)to;
    return 0;
}

static int memory_path(struct vfs *vfs, const char *path)
{
    (void)vfs;
    (void)path;
    return 0;
}

void memory_vfs_init(struct memory_vfs *memory, const uint8_t *data, size_t bytes)
{
    *memory = (struct memory_vfs){.vfs = {.open = memory_open,
                                          .close = memory_close,
                                          .pread = memory_pread,
                                          .size = memory_size,
                                          .stat = memory_stat},
                                  .data = data,
                                  .bytes = bytes};
}

void memory_vfs_init_writable(struct memory_vfs *memory, uint8_t *room, size_t room_bytes)
{
    memory_vfs_init(memory, room, 0);
    memory->room = room;
    memory->room_bytes = room_bytes;
    memory->vfs.pwrite = memory_pwrite;
    memory->vfs.sync = memory_sync;
    memory->vfs.rename = memory_rename;
    memory->vfs.unlink = memory_path;
    memory->vfs.dirsync = memory_path;
}
