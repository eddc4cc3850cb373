"""The compute child: started, watched, killed; the frames that it is spoken to by."""
