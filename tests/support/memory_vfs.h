/* memory_vfs: a vfs of one file in memory, which every path names.
 *
 * One open file at a time; one thread. Calls that are not filled in (NULL) are not to be made. */
#ifndef ANND_TESTS_SUPPORT_MEMORY_VFS_H
#define ANND_TESTS_SUPPORT_MEMORY_VFS_H

#include <stddef.h>
#include <stdint.h>

#include "storage/vfs.h"

struct memory_vfs {
    struct vfs vfs; /* to be passed down */
    struct vfs_file file;
    const uint8_t *data; /* the caller's */
    size_t bytes;
    uint8_t *room; /* data again where it may be written, else NULL */
    size_t room_bytes;
};

/* A file that can only be read. `data` stays the caller's and must outlive the vfs. */
void memory_vfs_init(struct memory_vfs *memory, const uint8_t *data, size_t bytes);
/* An empty file with room for so many bytes: a write beyond aborts. Sync, rename, unlink and
 * dirsync succeed and do nothing. */
void memory_vfs_init_writable(struct memory_vfs *memory, uint8_t *room, size_t room_bytes);

#endif
