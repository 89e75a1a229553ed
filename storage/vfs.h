/* vfs: the one table of file calls.
 *
 * Every call annd makes on stored data goes through a struct vfs that is passed down, so that tests
 * can fail, shorten, tear and forget any of them. Calls return 0 or a negative errno and print
 * nothing; file.h turns that into struct error. Paths are ordinary ones, relative to the working
 * directory or absolute. Any thread may call; one vfs_file may be read by several threads. */
#ifndef ANND_STORAGE_VFS_H
#define ANND_STORAGE_VFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct vfs;

enum vfs_flags {
    VFS_READ = 1,
    VFS_WRITE = 2,  /* implies read */
    VFS_CREATE = 4, /* the file must not exist (O_EXCL) */
    VFS_DIRECT = 8, /* bypass the page cache where the file system can, silently not where not */
    VFS_OPEN_OR_CREATE = 16 /* for lock files only */
};

enum vfs_kind { VFS_FILE, VFS_DIRECTORY, VFS_OTHER };

struct vfs_stat {
    enum vfs_kind kind;
    uint64_t bytes;
    uint64_t device; /* equal for two paths that can be hard-linked */
};

/* Embedded at the start of each implementation's own struct. */
struct vfs_file {
    struct vfs *vfs;
    int fd; /* for asynchronous backends; -1 where there is none */
};

typedef void (*vfs_list_fn)(void *context, const char *name, enum vfs_kind kind);

struct vfs {
    int (*open)(struct vfs *vfs, const char *path, unsigned flags, struct vfs_file **out);
    int (*close)(struct vfs_file *file);
    /* *got may be less than asked; 0 is the end of the file. */
    int (*pread)(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset, size_t *got);
    int (*pwrite)(struct vfs_file *file, const void *buffer, size_t bytes, uint64_t offset,
                  size_t *put);
    int (*sync)(struct vfs_file *file, bool data_only);
    int (*allocate)(struct vfs_file *file, uint64_t offset, uint64_t bytes);
    int (*truncate)(struct vfs_file *file, uint64_t bytes);
    int (*size)(struct vfs_file *file, uint64_t *bytes);
    /* Exclusive flock that does not wait: -EWOULDBLOCK when another process holds it. */
    int (*lock)(struct vfs_file *file);
    int (*stat)(struct vfs *vfs, const char *path, struct vfs_stat *out);
    int (*rename)(struct vfs *vfs, const char *from, const char *to);
    int (*link)(struct vfs *vfs, const char *from, const char *to);
    int (*unlink)(struct vfs *vfs, const char *path);
    int (*mkdir)(struct vfs *vfs, const char *path);
    int (*rmdir)(struct vfs *vfs, const char *path);
    /* Every entry but . and .., in no order. */
    int (*list)(struct vfs *vfs, const char *path, vfs_list_fn each, void *context);
    int (*dirsync)(struct vfs *vfs, const char *path);
    int (*space)(struct vfs *vfs, const char *path, uint64_t *free_bytes);
    /* What an asynchronous read of `bytes` at `offset` is to count as: called with its result
     * (bytes read or negative errno) and buffer, returns the result to believe. NULL: as is. */
    int (*read_result)(struct vfs_file *file, void *buffer, size_t bytes, uint64_t offset,
                       int result);
};

/* The real file system. Static: never freed. */
struct vfs *vfs_posix(void);

#endif
