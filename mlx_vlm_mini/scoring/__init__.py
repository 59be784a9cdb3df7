"""How well images and texts fit: CLIP, ViLT, InternVL's scores."""
