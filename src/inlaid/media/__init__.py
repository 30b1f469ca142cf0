"""Reading and writing of media: video, images, arrays, RGBA video and meshes."""
