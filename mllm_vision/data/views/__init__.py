"""Random views of images: the policies, their draws, their pixels."""
