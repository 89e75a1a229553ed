/* file: what annd does with whole files, on top of vfs, with errors that name the path.
 *
 * Helpers own the loops over short and interrupted calls, once. Any thread. */
#ifndef ANND_STORAGE_FILE_H
#define ANND_STORAGE_FILE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "storage/base/error.h"
#include "storage/vfs.h"

#define FILE_BLOCK_BYTES 4096u /* alignment of every O_DIRECT offset, length and buffer */
#define FILE_PATH_MAX 4096u

/* NULL and err on failure; the message names the path and what was tried. */
struct vfs_file *file_open(struct vfs *vfs, const char *path, unsigned flags, struct error *err);
/* NULL is accepted. Errors of close are reported (err may be NULL). */
int file_close(struct vfs_file *file, const char *path, struct error *err);

int file_size(struct vfs_file *file, const char *path, uint64_t *bytes, struct error *err);
/* Exactly `bytes` bytes, or ERR_CORRUPT "... ends at" when the file is shorter. */
int file_read_exact(struct vfs_file *file, const char *path, void *buffer, size_t bytes,
                    uint64_t offset, struct error *err);
int file_write_full(struct vfs_file *file, const char *path, const void *buffer, size_t bytes,
                    uint64_t offset, struct error *err);
int file_sync(struct vfs_file *file, const char *path, struct error *err);

/* Whole file into malloc'ed memory with a NUL after it; ERR_INVALID above bytes_max. */
int file_read_whole(struct vfs *vfs, const char *path, size_t bytes_max, uint8_t **out,
                    size_t *bytes, struct error *err);
/* Publishes content under `path`: path.tmp, write, fsync, rename over, fsync of the folder. A crash
 * leaves the old content or the new, whole. A leftover path.tmp is replaced. */
int file_publish(struct vfs *vfs, const char *path, const void *data, size_t bytes,
                 struct error *err);

int file_stat(struct vfs *vfs, const char *path, struct vfs_stat *out, struct error *err);
bool file_exists(struct vfs *vfs, const char *path);
int file_mkdir(struct vfs *vfs, const char *path, struct error *err);
int file_rename(struct vfs *vfs, const char *from, const char *to, struct error *err);
int file_dirsync(struct vfs *vfs, const char *path, struct error *err);
/* Removes a file, or a directory with all in it. A path that is not there is success. */
int file_remove_all(struct vfs *vfs, const char *path, struct error *err);
/* Sorted names in a directory, malloc'ed; free with file_names_free. */
int file_list(struct vfs *vfs, const char *path, char ***names, uint32_t *count, struct error *err);
void file_names_free(char **names, uint32_t count);

/* "a/b" into out[FILE_PATH_MAX]; ERR_INVALID when too long. */
int file_path_join(char *out, const char *folder, const char *name, struct error *err);
/* The folder part of path ("." when there is none) into out[FILE_PATH_MAX]. */
void file_path_folder(char *out, const char *path);

/* FILE_BLOCK_BYTES-aligned memory; free() it. NULL when memory is out. */
void *file_buffer_alloc(size_t bytes);

#endif
